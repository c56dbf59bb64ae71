# SPDX-License-Identifier: Apache-2.0
"""Stored names become names of the model by transformers' table; tensors that it merges are refused."""

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM

from omniq.models import families
from omniq.models.checkpoint import SafetensorsCheckpoint
from omniq.models.family import Family
from omniq.models.meta import meta_model
from omniq.models.source import SourceModel
from omniq.models.stored_names import with_model_names
from omniq.models.weight_files import SINGLE
from tests.helpers.opening import refused, stream, tokens
from tests.helpers.tiny import save_tiny

SIZES: dict[str, Any] = {
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "vocab_size": 272,
    "max_position_embeddings": 128,
    "tie_word_embeddings": False,
}
NEOX = Family(
    model_types=("gpt_neox",),
    blocks="gpt_neox.layers",
    groups=(("attention.query_key_value",), ("attention.dense",), ("mlp.dense_h_to_4h",), ("mlp.dense_4h_to_h",)),
)


def save_model(folder: Path, model_type: str, **overrides: Any) -> SafetensorsCheckpoint:
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(AutoConfig.for_model(model_type, **SIZES, **overrides)).save_pretrained(folder)
    return SafetensorsCheckpoint(folder, SINGLE)


def edit_names(folder: Path, change: Any) -> None:
    file = folder / SINGLE
    save_file({change(name): value for name, value in load_file(file).items()}, file, metadata={"format": "pt"})


def test_model_names_gpt_neox_head_under_stored_name_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    checkpoint = save_model(tmp_path, "gpt_neox")
    assert "embed_out.weight" in checkpoint.tensors
    assert "lm_head.weight" not in checkpoint.tensors
    monkeypatch.setattr(families, "FAMILIES", (NEOX,))
    source = SourceModel.open(tmp_path)
    with torch.no_grad():
        whole = AutoModelForCausalLM.from_pretrained(tmp_path)(tokens()).logits
    assert torch.equal(stream(source, tokens()), whole)
    assert source.digest() == checkpoint.digest()
    assert "lm_head.weight" in dict(source.outside())


def test_model_names_gpt_neox_head_under_module_name_is_found(tmp_path: Path) -> None:
    save_model(tmp_path, "gpt_neox")
    edit_names(tmp_path, lambda name: name.replace("embed_out", "lm_head"))
    checkpoint = SafetensorsCheckpoint(tmp_path, SINGLE)
    model = meta_model(AutoConfig.from_pretrained(tmp_path), torch.float32, "sdpa")
    assert with_model_names(checkpoint, model) is checkpoint


def test_model_names_parameter_stored_twice_is_refused(tmp_path: Path) -> None:
    save_tiny(tmp_path)
    tensors = load_file(tmp_path / SINGLE)
    tensors["norm.weight"] = tensors["model.norm.weight"] + 1
    save_file(tensors, tmp_path / SINGLE, metadata={"format": "pt"})
    refused(tmp_path, "model.norm.weight and norm.weight both hold the parameter model.norm.weight: remove one of them")


def test_model_names_of_inner_model_get_its_prefix(tmp_path: Path) -> None:
    save_tiny(tmp_path)
    expected = stream(SourceModel.open(tmp_path), tokens())
    edit_names(tmp_path, lambda name: name.removeprefix("model."))
    assert torch.equal(stream(SourceModel.open(tmp_path), tokens()), expected)


def test_model_names_of_unknown_tensors_are_kept(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    save_tiny(tmp_path)
    edit_names(tmp_path, lambda name: name.removeprefix("model."))
    tensors = load_file(tmp_path / SINGLE) | {"something.else": torch.zeros(1)}
    save_file(tensors, tmp_path / SINGLE, metadata={"format": "pt"})
    SourceModel.open(tmp_path)
    assert "stores 1 tensors the model does not use, such as something.else" in caplog.text
