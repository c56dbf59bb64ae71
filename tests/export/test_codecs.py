# SPDX-License-Identifier: Apache-2.0
"""Each codec stores a linear without loss and refuses what it cannot store."""

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from omniq.errors import UserError
from omniq.export.containers.shards import same_bits
from omniq.export.formats.codec import WrittenLinear
from omniq.export.formats.compressed_tensors import CompressedTensors
from omniq.export.formats.omniq import Omniq
from omniq.grid.affine import Grid
from omniq.grid.quantized_scales import QuantizedScales
from omniq.quantizers.activations import StaticGrid
from omniq.storage.block_result import Outliers, QuantizedLinear
from tests.helpers.schemes import scheme_of

DTYPES = st.sampled_from([torch.float16, torch.bfloat16, torch.float32])


@st.composite
def grids(draw: st.DrawFn) -> Grid:
    return Grid(draw(st.integers(2, 8)), draw(st.sampled_from([-1, 3, 8])), draw(st.booleans()), draw(DTYPES))


def random_linear(grid: Grid, outputs: int, groups: int, seed: int) -> QuantizedLinear:
    generator = torch.Generator().manual_seed(seed)
    size = 5 if grid.group_size == -1 else grid.group_size
    groups = 1 if grid.group_size == -1 else groups
    codes = torch.randint(0, 2**grid.bits, (outputs, groups * size), generator=generator)
    scale = grid.store(torch.randn(outputs, groups, generator=generator).exp())
    zero_point = torch.randint(0, 2**grid.bits, (outputs, groups), generator=generator)
    middle = torch.full_like(zero_point, 2 ** (grid.bits - 1))
    return QuantizedLinear.of(grid, codes, scale, middle if grid.symmetric else zero_point)


def assert_same(found: QuantizedLinear, expected: QuantizedLinear) -> None:
    left, right = found.to_state(), expected.to_state()
    assert left["grid"] == right["grid"]
    for part in ("codes", "scale", "zero_point"):
        assert same_bits(left[part], right[part]), part
    for part in ("outliers", "input"):
        ours, theirs = left[part] or {}, right[part] or {}
        assert ours.keys() == theirs.keys()
        assert all(same_bits(ours[key], theirs[key]) for key in ours), part


def round_trip(codec: Any, linear: QuantizedLinear) -> QuantizedLinear:
    """A linear stored among the tensors of another one, and loaded with the grid that the config gives."""
    codec.check_linear("a.x", linear)
    tensors = codec.store("a.x", linear)
    assert all(key.startswith("a.x.") for key in tensors)
    config = codec.quantization_config({"a.x": WrittenLinear.of(linear)}, ["a.y"])
    others = {key.replace("a.x.", "a.x2."): torch.zeros(1) for key in tensors}
    grid = codec.grid_of("a.x", config, linear.grid.scale_dtype)
    return codec.load("a.x", {**others, **tensors}, grid)


@settings(max_examples=40, deadline=None)
@given(grids(), st.integers(1, 40), st.integers(1, 5), st.integers(0, 99), st.sampled_from([16, 8]))
def test_compressed_tensors_store_then_load_is_identity(
    grid: Grid, outputs: int, groups: int, seed: int, activations: int
) -> None:
    linear = random_linear(grid, outputs, groups, seed)
    codec = CompressedTensors(scheme_of(grid, activations))
    assert_same(round_trip(codec, linear), linear)
    assert codec.bits(grid) == (grid.bits if activations == 16 else 8)


@pytest.mark.parametrize("symmetric", [False, True])
def test_compressed_tensors_store_then_load_keeps_fixed_ranges(symmetric: bool) -> None:
    grid = Grid(4, 8)
    scheme = scheme_of(grid, 8, activation_symmetric=symmetric, activation_range="tensor")
    fixed = StaticGrid.fit(torch.tensor(-3.0), torch.tensor(2.0), 8, symmetric, torch.float16)
    parts = random_linear(grid, 6, 3, 0)
    linear = QuantizedLinear(grid, parts.codes, parts.scale, parts.zero_point, input=fixed)
    assert_same(round_trip(CompressedTensors(scheme), linear), linear)
    with pytest.raises(ValueError, match=r"a\.x: the range of its input is missing, although the scheme fixes it"):
        CompressedTensors(scheme).check_linear("a.x", parts)


@settings(max_examples=40, deadline=None)
@given(grids(), st.integers(1, 40), st.integers(1, 5), st.integers(0, 99), st.booleans())
def test_omniq_store_then_load_is_identity(grid: Grid, outputs: int, groups: int, seed: int, sparse: bool) -> None:
    linear = random_linear(grid, outputs, groups, seed)
    if sparse:
        noise = torch.randn(linear.codes.shape, generator=torch.Generator().manual_seed(seed))
        outliers = Outliers.from_dense(noise * (noise > 1.5))
        linear = QuantizedLinear(grid, linear.codes, linear.scale, linear.zero_point, outliers)
    codec = Omniq(scheme_of(grid))
    assert_same(round_trip(codec, linear), linear)
    assert codec.bits(grid) == grid.bits


@pytest.mark.parametrize("second", [QuantizedScales(3, 0, 4), QuantizedScales(0, 2, 4), QuantizedScales(3, 2, 4)])
def test_omniq_store_then_load_keeps_second_levels(second: QuantizedScales) -> None:
    """Each run of rows has two values. Both are ends of the run, so they lie on its levels."""
    grid = Grid(3, 8, second=second)
    rows = torch.arange(10)[:, None] % 2
    linear = QuantizedLinear.of(grid, torch.ones(10, 16), (1.0 + rows).expand(10, 2), (2 * rows).expand(10, 2))
    assert_same(round_trip(Omniq(scheme_of(Grid(3, 8))), linear), linear)
    with pytest.raises(UserError, match=r"a\.x has quantized scales, which format compressed-tensors does not support"):
        CompressedTensors(scheme_of(Grid(3, 8))).check_linear("a.x", linear)


@pytest.mark.parametrize("codec", [CompressedTensors, Omniq])
def test_grid_of_linear_missing_in_config_is_refused(codec: Any) -> None:
    made = codec(scheme_of(Grid(4, 8, True)))
    linears = {
        name: WrittenLinear.of(random_linear(Grid(bits, 8, True), 2, 2, 0)) for name, bits in (("x", 4), ("y", 3))
    }
    config = made.quantization_config(linears, ["z"])
    assert made.grid_of("y", config, torch.float16) == Grid(3, 8, True)
    with pytest.raises(KeyError, match="z"):
        made.grid_of("z", config, torch.float16)
