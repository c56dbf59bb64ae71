# SPDX-License-Identifier: Apache-2.0
"""Scales and zero points on a second level: recovered from their values, packed, and unpacked."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from omniq.errors import UserError
from omniq.export.formats.omniq import pack_linear, packed_shapes, unpack_linear
from omniq.grid.affine import Grid
from omniq.grid.quantized_scales import QuantizedScales, level, nearest
from omniq.storage.block_result import BlockResult, QuantizedLinear
from tests.helpers.outliers import with_outliers

DTYPES = [torch.float16, torch.bfloat16, torch.float32]


@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 2**31), outputs=st.integers(1, 40), groups=st.integers(1, 3), rows=st.integers(2, 17),
    bits=st.integers(2, 8), dtype=st.sampled_from([*DTYPES, torch.uint8]), close=st.booleans(),
)  # fmt: skip
def test_quantized_scales_of_values_on_levels_round_trip(
    seed: int, outputs: int, groups: int, rows: int, bits: int, dtype: torch.dtype, close: bool
) -> None:
    """Levels coincide where the ends of a run are neighbours in the storage dtype."""
    generator, second = torch.Generator().manual_seed(seed), QuantizedScales(rows=rows)
    values = torch.rand(outputs, groups, generator=generator)
    if dtype == torch.uint8:
        values = (values * 255).to(dtype)
    else:
        values = (0.01 * (1 + torch.finfo(dtype).eps * 3 * values if close else values + 1e-3)).to(dtype)
    least, greatest = (second.spread(end, outputs) for end in second.ends(values))
    codes, levels = nearest(values, least, greatest, bits)
    assert torch.equal(levels, level(least, greatest, codes, bits))
    assert levels.dtype == dtype
    table = torch.stack([level(least, greatest, code, bits) for code in range(2**bits)]).double()
    distance = (table - values.double()).abs()
    assert torch.equal((levels.double() - values.double()).abs(), distance.amin(0))
    again, ends = second.encode(levels, bits)
    assert ends.shape == (2 * second.runs(outputs), groups)
    assert torch.equal(second.decode(again, ends, bits), levels)


def test_quantized_scales_levels_are_equal_steps_between_ends() -> None:
    values = torch.tensor([[0.1, 5.0], [0.8, 5.0], [0.33, 5.0], [2.0, 1.0]])
    second = QuantizedScales(rows=3)
    least, greatest = second.ends(values)
    assert least.tolist() == values[[0, 3]].tolist()
    assert greatest.tolist() == [values[1].tolist(), values[3].tolist()]
    steps = level(torch.tensor(0.1), torch.tensor(0.8), torch.arange(8), 3)
    torch.testing.assert_close(steps, torch.linspace(0.1, 0.8, 8))
    assert steps[0] == torch.tensor(0.1)
    assert steps[-1] == torch.tensor(0.8)
    zeros = level(torch.tensor(3, dtype=torch.uint8), torch.tensor(9, dtype=torch.uint8), torch.arange(8), 3)
    assert set(zeros.tolist()) == set(range(3, 10))  # not more than 2^3 - 1 apart: all of them
    with pytest.raises(ValueError, match="values are not on 8 levels between the smallest and the largest of 3 rows"):
        second.encode(values.half(), 3)


def on_levels(grid: Grid, outputs: int, inputs: int, seed: int = 0) -> QuantizedLinear:
    """A random linear whose scales and zero points are on the levels of their runs."""
    generator, second = torch.Generator().manual_seed(seed), grid.second or QuantizedScales(0, 0)
    shape = outputs, grid.groups(inputs)
    scale = torch.rand(shape, generator=generator).add(0.1).to(grid.scale_dtype)
    zero_point = torch.randint(0, 2**grid.bits, shape, generator=generator, dtype=torch.uint8)
    if grid.symmetric:
        zero_point.fill_(2 ** (grid.bits - 1))
    for bits, values in ((second.scale_bits, scale), (second.zero_bits, zero_point)):
        if bits:
            least, greatest = (second.spread(end, outputs) for end in second.ends(values))
            values.copy_(nearest(values, least, greatest, bits)[1])
    codes = torch.randint(0, 2**grid.bits, (outputs, inputs), generator=generator)
    return QuantizedLinear.of(grid, codes, scale, zero_point)


@pytest.mark.parametrize("support", ["none", "unstructured"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    "grid",
    [
        Grid(3, 5, second=QuantizedScales(3, 0)),
        Grid(4, 7, second=QuantizedScales(3, 3, 4)),
        Grid(4, 7, second=QuantizedScales(0, 2, 5)),
        Grid(2, -1, symmetric=True, second=QuantizedScales(8, 0)),
    ],
    ids=str,
)
def test_pack_linear_with_second_level_is_inverted_by_unpack_linear(
    grid: Grid, dtype: torch.dtype, support: str, tmp_path: Path
) -> None:
    grid = replace(grid, scale_dtype=dtype)
    linear = with_outliers(on_levels(grid, 37, 35), support)
    stored = pack_linear(linear)
    count = None if linear.outliers is None else len(linear.outliers.value)
    shapes = packed_shapes(grid, 37, 35, count)
    assert {name: tuple(tensor.shape) for name, tensor in stored.items()} == {n: s for n, (s, _) in shapes.items()}
    back = unpack_linear(stored, grid)
    assert back.grid == grid
    for part in ("codes", "scale", "zero_point"):
        assert torch.equal(getattr(back, part), getattr(linear, part))
        assert getattr(back, part).dtype == getattr(linear, part).dtype
    assert torch.equal(back.dequantize(), linear.dequantize())
    path = tmp_path / "block.safetensors"
    BlockResult({"x": linear}, {}).save(path)
    assert BlockResult.load(path).linears["x"].grid == grid
    assert QuantizedLinear.from_state(linear.to_state()).grid == grid


@pytest.mark.parametrize(
    ("wrong", "told"),
    [
        ({"scale_bits": 1}, "scale_bits 1 is out of range: give 2 to 8"),
        ({"zero_bits": -3}, "zero_bits -3 is not possible"),
        ({"rows": 0}, "scale_group 0 is too small for scales"),
    ],
)
def test_quantized_scales_invalid_settings_are_refused(wrong: dict[str, Any], told: str) -> None:
    with pytest.raises(UserError, match=told):
        QuantizedScales(**wrong)


def test_grid_unneeded_zero_bits_are_refused() -> None:
    with pytest.raises(UserError, match="zero_bits 3 saves no space for zero points of 3 bits: set it to 0"):
        Grid(3, second=QuantizedScales(3, 3))
    with pytest.raises(UserError, match="saves no space for zero points of a symmetric grid"):
        Grid(8, symmetric=True, second=QuantizedScales(3, 3))
