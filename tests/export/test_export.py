# SPDX-License-Identifier: Apache-2.0
"""Exported checkpoints hold the optimised model, and ``from_pretrained`` of transformers computes with it."""

import json
import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from omniq.errors import UserError
from omniq.evaluate.perplexity import evaluate_model
from omniq.export import Report
from omniq.export.containers import shards
from omniq.export.containers.target_model import target_model
from omniq.grid.affine import Grid
from omniq.models.source import SourceModel
from omniq.storage.block_result import BlockResult
from tests.helpers.exported import CARD, WINDOWS, export, opened, rounded, verify
from tests.helpers.schemes import scheme_of
from tests.helpers.tiny import save_tiny


@torch.no_grad()
def dequantized_logits(source: SourceModel, results: list[BlockResult], dtype: torch.dtype) -> Tensor:
    """Logits of the source model with the optimised weights, by the code of transformers."""
    model = AutoModelForCausalLM.from_pretrained(source.folder, dtype=dtype).eval()
    for index, result in enumerate(results):
        model.get_submodule(source.block_name(index)).load_state_dict(dict(result.dequantized(dtype)))
    return torch.cat([model(window[None]).logits for window in WINDOWS])


GRIDS = [
    Grid(2, 32),
    Grid(3, 32),
    Grid(4, 32),
    Grid(8, 32),
    Grid(3, -1),
    Grid(4, -1, symmetric=True),
    Grid(2, 32, symmetric=True),
    Grid(3, 32, symmetric=True),
    Grid(8, -1, symmetric=True),
    Grid(3, 16, scale_dtype=torch.bfloat16),
    Grid(5, -1, symmetric=True, scale_dtype=torch.bfloat16),
    Grid(4, 32, scale_dtype=torch.float32),
]


@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
@pytest.mark.parametrize("grid", GRIDS, ids=str)
def test_compressed_tensors_export_opened_by_transformers_has_our_logits(
    grid: Grid, tied: bool, tmp_path: Path
) -> None:
    source = opened(tmp_path / "source", grid, tie_word_embeddings=tied)
    results = rounded(source, grid)
    out = export(source, results, tmp_path / "out")

    model = AutoModelForCausalLM.from_pretrained(out).eval()
    with torch.no_grad():
        logits = torch.cat([model(window[None]).logits for window in WINDOWS])
    assert model.dtype == grid.scale_dtype
    assert torch.equal(logits, dequantized_logits(source, results, grid.scale_dtype))  # measured: 0.0 for every grid
    assert (model.lm_head.weight is model.model.embed_tokens.weight) == tied

    tokenizer = AutoTokenizer.from_pretrained(out)
    prompt = tokenizer("Hello", return_tensors="pt")
    assert model.generate(**prompt, max_new_tokens=3, min_new_tokens=3, do_sample=False).shape == (1, 8)

    report = verify(out, source, results, windows=WINDOWS, tolerance=0.0)
    codes = sum(linear.codes.numel() for result in results for linear in result.linears.values())
    assert report.perplexity == pytest.approx(evaluate_model(model, WINDOWS).perplexity, rel=1e-6)
    assert replace(report, perplexity=0.0) == Report(
        linears=14, codes=codes, others=7 - tied, windows=2, perplexity=0.0
    )


@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("activation_symmetric", [False, True])
def test_export_with_integer_activations_verifies_and_quantizes_inputs(
    symmetric: bool, activation_symmetric: bool, source: SourceModel, tmp_path: Path
) -> None:
    grid = Grid(4, 32, symmetric)
    results = rounded(source, grid)
    scheme = scheme_of(grid, 8, activation_symmetric=activation_symmetric)
    out = export(source, results, tmp_path / "out", scheme=scheme)
    stored = load_file(out / "model.safetensors")
    assert stored["model.layers.0.mlp.up_proj.weight"].dtype == torch.int8
    # measured 0.0
    assert verify(out, source, results, scheme=scheme, windows=WINDOWS, tolerance=0.0).windows == 2

    model = AutoModelForCausalLM.from_pretrained(out).eval()
    with torch.no_grad():
        logits = torch.cat([model(window[None]).logits for window in WINDOWS])
    plain = dequantized_logits(source, results, torch.float16)
    error = float((logits - plain).norm() / plain.norm())
    assert 1e-4 < error < 0.1  # they really are quantized; measured 0.0106 to 0.0133


def test_export_in_shards_holds_same_tensors(source: SourceModel, results: list[BlockResult], tmp_path: Path) -> None:
    single = export(source, results, tmp_path / "single")
    sharded = export(source, results, tmp_path / "sharded", max_shard_bytes=20_000)
    index = json.loads((sharded / "model.safetensors.index.json").read_text())
    files = sorted(set(index["weight_map"].values()))
    assert len(files) > 3
    assert files == sorted(path.name for path in sharded.glob("*.safetensors"))
    assert files[0] == f"model-00001-of-{len(files):05d}.safetensors"
    one = load_file(single / "model.safetensors")
    many: dict[str, Tensor] = {}
    for file in files:
        many |= load_file(sharded / file)
    assert one.keys() == many.keys() == index["weight_map"].keys()
    assert all(shards.same_bits(one[name], many[name]) for name in one)
    assert index["metadata"]["total_size"] == sum(t.numel() * t.element_size() for t in one.values())
    verify(sharded, source, results, windows=WINDOWS, tolerance=0.0)


def test_export_folder_is_complete_without_machine_paths(
    source: SourceModel, results: list[BlockResult], tmp_path: Path
) -> None:
    (source.folder / "generation_config.json").write_text('{"temperature": 0.6, "do_sample": false}')
    out = export(source, results, tmp_path / "out")
    text = {path.name: path.read_text() for path in out.iterdir() if path.suffix != ".safetensors"}
    assert text.keys() >= {"config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json"}
    assert text["recipe.yaml"] == CARD["recipe"]
    assert text["generation_config.json"] == '{"temperature": 0.6, "do_sample": false}'  # refused by save_pretrained
    assert not [name for name, content in text.items() if str(tmp_path) in content]
    config = json.loads(text["config.json"])
    assert config["dtype"] == "float16"
    assert config["architectures"] == ["LlamaForCausalLM"]
    assert config["quantization_config"]["ignore"] == ["lm_head"]
    assert config["quantization_config"]["dequantize"] is True
    assert "W4A16g32" in text["README.md"]
    again = export(source, results, tmp_path / "again" / "out")
    assert {p.name: p.read_bytes() for p in out.iterdir()} == {p.name: p.read_bytes() for p in again.iterdir()}


def test_export_of_source_with_own_code_becomes_stock_model(tmp_path: Path) -> None:
    """The code files are not copied, so the config must not refer to them."""
    folder = save_tiny(tmp_path / "source", dtype=torch.float16)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "auto_map": {"AutoModelForCausalLM": "code.Model"}}))
    source = SourceModel.open(folder)
    results = rounded(source, Grid(4, 32))
    out = export(source, results, tmp_path / "out")
    assert type(AutoModelForCausalLM.from_pretrained(out, trust_remote_code=True)).__name__ == "LlamaForCausalLM"
    verify(out, source, results, windows=WINDOWS, tolerance=0.0)


@pytest.mark.parametrize(
    "rope",
    [
        {"rope_type": "default", "rope_theta": 500000.0},
        {
            "rope_type": "llama3",
            "rope_theta": 500000.0,
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 64,
        },
    ],
    ids=lambda rope: rope["rope_type"],
)
def test_export_writes_rotary_keys_of_transformers_4(rope: dict[str, Any], tmp_path: Path) -> None:
    """vLLM may run on transformers 4. Without ``rope_theta`` it silently uses the base 10000."""
    source = opened(tmp_path / "source", Grid(4, 32), rope_parameters=rope)
    results = rounded(source, Grid(4, 32))
    out = export(source, results, tmp_path / "out")
    content = json.loads((out / "config.json").read_text())
    assert content["rope_theta"] == 500000.0
    scaling = {key: value for key, value in rope.items() if key != "rope_theta"}
    assert content.get("rope_scaling") == (scaling if rope["rope_type"] == "llama3" else None)
    assert AutoConfig.from_pretrained(out).rope_parameters == source.config.rope_parameters
    verify(out, source, results, windows=WINDOWS, tolerance=0.0)


def test_export_files_have_mode_of_umask(source: SourceModel, results: list[BlockResult], tmp_path: Path) -> None:
    before = os.umask(0o027)
    try:
        out = export(source, results, tmp_path / "out", max_shard_bytes=50_000)
    finally:
        os.umask(before)
    assert {oct(path.stat().st_mode & 0o777) for path in out.iterdir()} == {"0o640"}


# -- biases that the source does not have ---------------------------------------------------------------------------


def test_export_with_new_biases_switches_config_and_zeros_siblings(
    source: SourceModel, results: list[BlockResult], tmp_path: Path
) -> None:
    added = {"self_attn.o_proj.bias": torch.linspace(-1, 1, 64), "mlp.up_proj.bias": torch.linspace(-1, 1, 128)}
    results[1] = BlockResult(results[1].linears, {**results[1].tensors, **added})
    out = export(source, results, tmp_path / "out")
    model = AutoModelForCausalLM.from_pretrained(out)
    assert model.config.attention_bias
    assert model.config.mlp_bias
    block = model.model.layers[1]
    assert torch.equal(block.self_attn.o_proj.bias, added["self_attn.o_proj.bias"].half())
    assert not block.self_attn.q_proj.bias.any()
    assert not model.model.layers[0].self_attn.o_proj.bias.any()
    assert not source.config.attention_bias
    report = verify(out, source, results, windows=WINDOWS, tolerance=0.0)
    assert report.others == 7 + 2 * 7  # embedding, head, norms; a bias for each linear


def test_export_keeps_biases_of_source(tmp_path: Path) -> None:
    grid = Grid(4, 32)
    source = opened(tmp_path / "source", grid, attention_bias=True)
    results = rounded(source, grid)
    out = export(source, results, tmp_path / "out")
    verify(out, source, results, windows=WINDOWS, tolerance=0.0)
    assert load_file(out / "model.safetensors")["model.layers.0.self_attn.q_proj.bias"].any()


def test_export_bias_without_place_is_refused(tmp_path: Path) -> None:
    source = opened(tmp_path / "source", Grid(4, 32), family="mistral")
    bias = "model.layers.0.mlp.up_proj.bias"
    with pytest.raises(UserError, match=r"MistralForCausalLM cannot hold model\.layers\.0\.mlp\.up_proj\.bias"):
        target_model(source.config, [bias])
    results = rounded(source, Grid(4, 32))
    results[0] = BlockResult(results[0].linears, {**results[0].tensors, "mlp.up_proj.bias": torch.ones(128)})
    with pytest.raises(UserError, match="cannot hold"):
        export(source, results, tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("family", ["qwen2", "qwen3", "opt"])
def test_export_of_other_families_verifies(family: str, tmp_path: Path) -> None:
    grid = Grid(3, 32)
    source = opened(tmp_path / "source", grid, family=family)
    results = rounded(source, grid)
    out = export(source, results, tmp_path / "out")
    verify(out, source, results, windows=WINDOWS, tolerance=0.0)


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_export_in_dtype_other_than_source_verifies(dtype: torch.dtype, tmp_path: Path) -> None:
    source = opened(tmp_path / "source", Grid(4, 32, scale_dtype=torch.bfloat16))
    results = rounded(source, Grid(4, 32, scale_dtype=dtype))
    out = export(source, results, tmp_path / "out")
    verify(out, source, results, windows=WINDOWS, tolerance=0.0)  # measured: 0.0


def test_export_of_source_with_one_of_two_tied_tables_verifies(tmp_path: Path) -> None:
    folder = save_tiny(tmp_path / "source", dtype=torch.float16, tie_word_embeddings=True)
    tensors = load_file(folder / "model.safetensors")
    tensors["lm_head.weight"] = tensors.pop("model.embed_tokens.weight")
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    source = SourceModel.open(folder)
    results = rounded(source, Grid(4, 32))
    out = export(source, results, tmp_path / "out")
    verify(out, source, results, windows=WINDOWS, tolerance=0.0)


# -- refusals -------------------------------------------------------------------------------------------------------
