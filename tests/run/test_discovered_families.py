# SPDX-License-Identifier: Apache-2.0
"""Whole runs of undeclared families; the zoo (``make zoo``) covers all types."""

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

import omniq
from omniq.errors import UserError
from omniq.storage.block_result import BlockResult
from tests.helpers.independent import dequantized_source, relative_error, stored_tensors
from tests.helpers.opening import tokens
from tests.helpers.runs import QUICK, configuration, write_text
from tests.helpers.tiny import tiny_tokenizer
from tests.helpers.zoo import zoo_model

FLOAT32 = {"trainer": {"accelerator": "cpu", "precision": "32-true"}, "evaluation": None}
RTN = [{"class_path": "omniq.stages.RTN"}]


def quantize(folder: Path, name: str, **sections: Any) -> Path:
    """Quantize a variant of the zoo; return the folder of the run."""
    zoo_model(name).save_pretrained(folder / "source")
    tiny_tokenizer().save_pretrained(folder / "source")
    write_text(folder / "text.txt")
    settings = configuration(folder, **{**FLOAT32, **sections})
    settings.pop("model")
    return omniq.quantize(folder / "source", **settings)


@pytest.mark.parametrize("name", ["apertus", "bamba", "glm", "mpt", "nemotron_h", "xglm"])
def test_run_of_undeclared_family_exports_what_independent_code_computes(tmp_path: Path, name: str) -> None:
    run = quantize(tmp_path, name, scheme={"name": "W4A16g32", "dtype": "float32"}, stages=RTN)
    export = AutoModelForCausalLM.from_pretrained(run / "model", dtype=torch.float32).eval()
    expected, linears = dequantized_source(tmp_path / "source", run / "model", tmp_path / "plain")
    assert linears >= 6
    assert relative_error(export, expected.eval(), tokens()) <= 1e-6  # measured: 0


def test_run_of_undeclared_family_stores_saved_buffers_of_blocks(tmp_path: Path) -> None:
    run = quantize(tmp_path, "gemma4_text", scheme={"name": "W4A16g32", "dtype": "float32"}, stages=RTN)
    name = "model.layers.0.layer_scalar"
    assert torch.equal(stored_tensors(run / "model")[name], stored_tensors(tmp_path / "source")[name])
    assert "layer_scalar" in BlockResult.load(run / "blocks" / "000.safetensors").tensors


def test_run_with_transform_of_undeclared_family_keeps_equivalence(tmp_path: Path) -> None:
    """The default equivalences, which include queries and keys; the verification compares logits with the blocks."""
    stages = [{"class_path": "omniq.stages.OmniQuant", "init_args": {"epochs": 1, "transform": {"alpha": 0.5}}}]
    run = quantize(tmp_path, "cohere", scheme={"name": "W4A8", "dtype": "float32"}, stages=stages)
    found, plain = (stored_tensors(folder) for folder in (run / "model", tmp_path / "source"))
    norm = "model.layers.0.input_layernorm.weight"
    assert not torch.allclose(found[norm], plain[norm], rtol=1e-2)


def test_run_in_omniq_format_of_undeclared_family_quantizes_activations(tmp_path: Path) -> None:
    run = quantize(tmp_path, "phi", scheme={"name": "W4A8", "dtype": "float32"}, stages=RTN, export={"format": "omniq"})
    export = AutoModelForCausalLM.from_pretrained(run / "model").eval()
    linear = export.model.layers[0].mlp.fc1
    seen: list[torch.Tensor] = []
    linear.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    with torch.no_grad():
        export(tokens(1), use_cache=False)
    assert all(len(row.unique()) <= 256 for row in seen[0].flatten(0, 1))


def test_run_in_omniq_format_of_undeclared_family_with_quantized_cache_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="does not support quantized queries, keys and values of phi, a family that"):
        quantize(
            tmp_path, "phi", **QUICK | {"scheme": {"name": "W4A16KV4"}, "stages": RTN, "export": {"format": "omniq"}}
        )
