# SPDX-License-Identifier: Apache-2.0
"""The layout of MLX: exact weights, grids in the config, and what it refuses."""

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from omniq.errors import UserError
from omniq.export import VerificationError, check_format
from omniq.export.formats.codec import WrittenLinear
from omniq.export.formats.mlx import Mlx
from omniq.grid.affine import Grid
from omniq.grid.scheme import Scheme
from omniq.models.source import SourceModel
from omniq.storage.block_result import BlockResult, QuantizedLinear
from tests.helpers.exported import WINDOWS, export, opened, rounded, verify
from tests.helpers.schemes import scheme_of


def linear_on(grid: Grid, significant: int = 11) -> QuantizedLinear:
    """A random linear whose scales have this number of significant bits."""
    generator = torch.Generator().manual_seed(grid.bits)
    groups = grid.groups(128)
    codes = torch.randint(0, grid.max_code + 1, (6, 128), generator=generator)
    zero_point = torch.randint(0, grid.max_code + 1, (6, groups), generator=generator)
    zero_point = torch.full((6, groups), 2 ** (grid.bits - 1)) if grid.symmetric else zero_point
    scale = torch.randint(2 ** (significant - 1), 2**significant, (6, groups), generator=generator) / 2**significant
    return QuantizedLinear.of(grid, codes, scale, zero_point)


def dequantized(stored: dict[str, torch.Tensor], bits: int, group_size: int) -> np.ndarray:
    """``q s + biases`` in float64, with each code taken from its bits in the row."""
    rows = []
    for row, scales, biases in zip(stored["x.weight"], stored["x.scales"], stored["x.biases"], strict=True):
        stream = sum(int(word) << 32 * place for place, word in enumerate(row.tolist()))
        codes = [stream >> bits * place & (2**bits - 1) for place in range(128)]
        s, b = (part.double().numpy().repeat(group_size) for part in (scales, biases))
        rows.append(np.array(codes) * s + b)
    return np.stack(rows)


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("group_size", [32, 64, 128])
@pytest.mark.parametrize("bits", [2, 3, 4, 5, 6, 8])
def test_mlx_tensors_hold_weights_exactly(bits: int, group_size: int, symmetric: bool) -> None:
    grid = Grid(bits, group_size, symmetric)
    linear, codec = linear_on(grid), Mlx(scheme_of(grid))
    stored = codec.store("x", linear)
    assert {name: tensor.dtype for name, tensor in stored.items()} == {
        "x.weight": torch.uint32,
        "x.scales": torch.float32,
        "x.biases": torch.float32,
    }
    assert np.array_equal(dequantized(stored, bits, group_size), linear.dequantize(torch.float64).numpy())
    found = codec.load("x", stored, grid)
    for part in ("codes", "scale", "zero_point"):
        assert torch.equal(getattr(found, part), getattr(linear, part))


@pytest.mark.parametrize(("significant", "dtype"), [(7, torch.float16), (8, torch.float32)])
def test_mlx_scales_of_few_bits_are_stored_in_float16(significant: int, dtype: torch.dtype) -> None:
    """``q s`` of 4-bit codes has 4 more bits than ``s``, and float16 has 11."""
    grid = Grid(4, 32)
    linear = linear_on(grid, significant)
    stored = Mlx(scheme_of(grid)).store("x", linear)
    assert stored["x.scales"].dtype == stored["x.biases"].dtype == dtype
    assert np.array_equal(dequantized(stored, 4, 32), linear.dequantize(torch.float64).numpy())


def test_mlx_biases_that_are_not_multiples_of_scales_are_refused() -> None:
    grid = Grid(4, 32)
    codec = Mlx(scheme_of(grid))
    stored = codec.store("x", linear_on(grid))
    stored["x.biases"][2, 1] *= 1.001
    with pytest.raises(ValueError, match="scales and biases are not those of a grid of 4 bits"):
        codec.load("x", stored, grid)


def test_mlx_grids_of_a_mixture_are_read_back() -> None:
    codec = Mlx(Scheme("W4A16g32"))
    grids = {"a": Grid(4, 32), "b": Grid(3, 64, True), "c": Grid(4, 32, True), "d": Grid(4, 32)}
    config = codec.quantization_config({name: WrittenLinear.of(linear_on(grid)) for name, grid in grids.items()}, ["e"])
    assert config == {
        "bits": 4,
        "group_size": 32,
        "mode": "affine",
        "b": {"bits": 3, "group_size": 64},
        "e": False,
        "symmetric": ["b", "c"],
    }
    assert {name: codec.grid_of(name, config, torch.float16) for name in grids} == grids
    with pytest.raises(KeyError, match="e"):
        codec.grid_of("e", config, torch.float16)


@pytest.mark.parametrize("grid", [Grid(4, 64), Grid(3, 32, True), Grid(4, -1)])
def test_export_mlx_is_verified_block_by_block(grid: Grid, tmp_path: Path) -> None:
    source = opened(tmp_path / "source", grid, tie_word_embeddings=True)
    results = rounded(source, grid)
    out = export(source, results, tmp_path / "out", format="mlx")
    report = verify(out, source, results, format="mlx", windows=WINDOWS, tolerance=0.0)
    assert (report.lacking, report.relative_error) == ("transformers does not read the layout of MLX", 0.0)
    config = json.loads((out / "config.json").read_text())
    size = 64 if grid.group_size == -1 else grid.group_size  # the widths are 64 and 128
    assert config["quantization"] == {"bits": grid.bits, "group_size": size, "mode": "affine", "lm_head": False}
    assert "mlx_lm.generate --model out" in (out / "README.md").read_text()


def test_verify_changed_code_of_mlx_is_found(source: SourceModel, results: list[BlockResult], tmp_path: Path) -> None:
    out = export(source, results, tmp_path / "out", format="mlx")
    tensors = load_file(out / "model.safetensors")
    tensors["model.layers.1.mlp.up_proj.weight"].view(torch.int32)[2, 3] ^= 1
    save_file(tensors, out / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(VerificationError, match=re.escape("model.layers.1.mlp.up_proj: codes differ first at [2, 24]")):
        verify(out, source, results, format="mlx")


@pytest.mark.parametrize(
    ("scheme", "overrides", "message"),
    [
        (Scheme("W7A16g32"), {}, "does not support 7 bits, only 2, 3, 4, 5, 6 or 8"),
        (Scheme("W4A16g16"), {}, "does not support groups of 16, only of 32, 64 or 128"),
        (Scheme("W4A8g32"), {}, "does not support quantized activations"),
        (Scheme("W4A16g32"), {"family": "opt"}, "does not support models of type 'opt'"),
    ],
)
def test_check_mlx_refuses_with_the_formats_that_can(
    scheme: Scheme, overrides: dict[str, Any], message: str, tmp_path: Path
) -> None:
    source = opened(tmp_path / "source", Grid(4, 32), **overrides)
    with pytest.raises(UserError, match=f"export.format mlx {message}.*; formats that can hold it: .*omniq"):
        check_format("mlx", scheme, source=source)
