# SPDX-License-Identifier: Apache-2.0
"""Exports with several grids and linears in floating point are read by transformers, or refused."""

import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM

from omniq.errors import UserError
from omniq.export.formats.compressed_tensors import CompressedTensors
from omniq.grid.affine import Grid
from omniq.models.source import SourceModel
from omniq.runtime.linear import PackedLinear
from omniq.storage.block_result import BlockResult
from tests.helpers.exported import WINDOWS, export, opened, rounded, verify
from tests.helpers.outliers import expected_logits, logits
from tests.helpers.schemes import scheme_of


def mixed(source: SourceModel, default: Grid, own: Mapping[str, Grid | None]) -> list[BlockResult]:
    """Every block rounded to nearest, some linears on grids of their own; None leaves one in floating point."""
    results = rounded(source, default)
    for name, grid in own.items():
        for index, result in enumerate(results):
            linears, tensors = dict(result.linears), dict(result.tensors)
            if grid is None:
                del linears[name]
                tensors[f"{name}.weight"] = (
                    source.block(index, dtype=torch.float32).get_parameter(f"{name}.weight").data
                )
            else:
                linears[name] = rounded(source, grid)[index].linears[name]
            results[index] = replace(result, linears=linears, tensors=tensors)
    return results


OWN = {"mlp.down_proj": Grid(8, -1, True), "self_attn.v_proj": Grid(4, 16, True), "self_attn.o_proj": None}


@pytest.mark.parametrize("format", ["compressed-tensors", "omniq"])
def test_export_with_several_grids_computes_in_transformers(format: str, tmp_path: Path) -> None:
    grid = Grid(4, 32, symmetric=True)
    source = opened(tmp_path / "source", grid)
    results = mixed(source, grid, OWN)
    out = export(source, results, tmp_path / "out", format=format)
    report = verify(out, source, results, format=format, windows=WINDOWS, tolerance=0.0)
    assert (report.linears, report.lacking) == (12, None)
    model = AutoModelForCausalLM.from_pretrained(out)
    assert torch.equal(logits(model), expected_logits(source, results, torch.float16))
    kept = model.model.layers[1].self_attn.o_proj
    assert type(kept) is nn.Linear
    assert torch.equal(kept.weight, results[1].tensors["self_attn.o_proj.weight"].half())


def test_compressed_tensors_writes_group_for_each_grid(tmp_path: Path) -> None:
    grid = Grid(4, 32, symmetric=True)
    source = opened(tmp_path / "source", grid)
    out = export(source, mixed(source, grid, OWN), tmp_path / "out")
    config = json.loads((out / "config.json").read_text())["quantization_config"]
    groups = list(config["config_groups"].values())
    bits = [(group["weights"]["num_bits"], group["weights"]["group_size"]) for group in groups]
    assert sorted(bits, key=str) == [(4, 16), (4, 32), (8, None)]
    targets = [name for group in groups for name in group["targets"]]
    assert len(targets) == len(set(targets)) == 12
    assert config["ignore"] == ["model.layers.0.self_attn.o_proj", "model.layers.1.self_attn.o_proj", "lm_head"]


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("format", ["compressed-tensors", "omniq"])
def test_export_with_several_grids_and_integer_activations_verifies(
    format: str, symmetric: bool, tmp_path: Path
) -> None:
    """Kept linears receive floating-point inputs in transformers and in omniq's own evaluation."""
    grid = Grid(4, 32, symmetric)
    source = opened(tmp_path / "source", grid)
    results = mixed(source, grid, {**OWN, "mlp.down_proj": Grid(6, -1, symmetric)})
    scheme = scheme_of(grid, 8)
    out = export(source, results, tmp_path / "out", format=format, scheme=scheme)
    report = verify(out, source, results, format=format, scheme=scheme, windows=WINDOWS, tolerance=0.0)
    assert report.lacking is None


def test_omniq_export_with_asymmetric_grids_verifies(tmp_path: Path) -> None:
    grid = Grid(4, 32)
    source = opened(tmp_path / "source", grid)
    results = mixed(source, grid, {"mlp.down_proj": Grid(8, -1), "mlp.up_proj": Grid(2, 16), "self_attn.k_proj": None})
    out = export(source, results, tmp_path / "out", format="omniq")
    verify(out, source, results, format="omniq", windows=WINDOWS, tolerance=0.0)
    model = AutoModelForCausalLM.from_pretrained(out)
    assert sum(isinstance(module, PackedLinear) for module in model.modules()) == 12
    assert torch.equal(logits(model), expected_logits(source, results, torch.float16))
    assert torch.equal(logits(model.dequantize()), expected_logits(source, results, torch.float16))


def test_compressed_tensors_several_asymmetric_grids_are_refused(tmp_path: Path) -> None:
    """transformers would silently unpack all of them by the first grid."""
    grid, other = Grid(4, 32), Grid(8, -1, symmetric=True)
    words = "W4A16g32: .* does not support 2 grids of which one is asymmetric, .*: use format omniq, or set scheme.sym"
    codec = CompressedTensors(scheme_of(grid))
    codec.check(grids={grid: ()})
    codec.check(grids={Grid(4, 32, symmetric=True): (), other: ()})
    with pytest.raises(UserError, match=words):
        codec.check(grids={grid: (), other: ()})
    source = opened(tmp_path / "source", grid)
    with pytest.raises(UserError, match=words):
        export(source, mixed(source, grid, {"mlp.down_proj": other}), tmp_path / "out")
    assert not (tmp_path / "out").exists()
