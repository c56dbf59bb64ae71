# SPDX-License-Identifier: Apache-2.0
"""Linears restated in wider codes or smaller groups have the same weights, bit for bit."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from omniq.errors import UserError
from omniq.export.containers.shards import same_bits
from omniq.export.restate import restate, stored_bits_per_weight, stored_scheme
from omniq.grid.affine import Grid
from omniq.grid.rule import Rule
from omniq.grid.scheme import Scheme
from omniq.storage.block_result import Outliers, QuantizedLinear

SHAPES = {"a.0.q": (6, 192), "a.0.up": (4, 320)}  # 64 divides both inputs, 128 does not


def random_linear(grid: Grid, outputs: int, inputs: int, seed: int) -> QuantizedLinear:
    """A linear whose first groups have the extreme zero points 0 and ``2^b - 1``."""
    generator = torch.Generator().manual_seed(seed)
    groups = grid.groups(inputs)
    codes = torch.randint(0, 2**grid.bits, (outputs, inputs), generator=generator)
    scale = grid.store(torch.randn(outputs, groups, generator=generator).exp())
    zero_point = torch.randint(0, 2**grid.bits, (outputs, groups), generator=generator)
    zero_point[0], zero_point[-1] = 0, grid.max_code
    middle = torch.full_like(zero_point, 2 ** (grid.bits - 1))
    return QuantizedLinear.of(grid, codes, scale, middle if grid.symmetric else zero_point)


@settings(max_examples=60, deadline=None)
@given(st.integers(2, 7), st.sampled_from([4, 8]), st.sampled_from([-1, 32]), st.booleans(), st.integers(0, 99))
def test_restate_in_wider_codes_keeps_every_weight(
    bits: int, wider: int, group: int, symmetric: bool, seed: int
) -> None:
    if bits >= wider:
        return
    linear = random_linear(Grid(bits, group, symmetric), 5, 96, seed)
    found = restate(linear, Grid(wider, group, True))
    assert same_bits(found.dequantize(), linear.dequantize())
    assert found.zero_point.unique().tolist() == [2 ** (wider - 1)]
    assert int(found.codes.min()) >= 1  # so that q - z is also in the range of runtimes without the lowest code


@pytest.mark.parametrize("symmetric", [False, True])
def test_restate_in_groups_repeats_scales(symmetric: bool) -> None:
    linear = random_linear(Grid(4, -1, symmetric), 5, 96, 0)
    found = restate(linear, Grid(4, 32, symmetric))
    assert same_bits(found.dequantize(), linear.dequantize())
    assert same_bits(found.codes, linear.codes)
    assert found.scale.shape == found.zero_point.shape == (5, 3)


def test_stored_scheme_takes_largest_group_that_divides_all_inputs() -> None:
    scheme = Scheme("W4A16")

    def name(*groups: int) -> str:
        return stored_scheme(scheme, SHAPES, container_bits=None, groups=groups).name

    assert name(128, 64, 32) == "W4A16g64"
    assert name(128) == name() == "W4A16"
    grouped = Scheme("W4A16g32")
    assert stored_scheme(grouped, SHAPES, container_bits=None, groups=(128, 64)) is grouped


def test_stored_scheme_widens_only_narrower_grids() -> None:
    rules = (Rule("*.up", "W8A16g64"), Rule("*.down", "none"), Rule("*.o", "W3A16g64", symmetric=False))
    scheme = Scheme("W2A16g32", symmetric=False, rules=rules)
    found = stored_scheme(scheme, SHAPES, container_bits=4, groups=())
    assert found.grid_of("a.0.q") == Grid(4, 32, True)
    assert found.grid_of("a.0.up") == Grid(8, 64, False)
    assert found.grid_of("a.0.down") is None
    assert found.grid_of("a.0.o") == Grid(4, 64, True)


def test_stored_scheme_without_narrower_grid_is_refused() -> None:
    with pytest.raises(UserError, match="export.container_bits 4: scheme W4A16g32 has no grid of fewer than 4 bits"):
        stored_scheme(Scheme("W4A16g32"), SHAPES, container_bits=4, groups=())


def test_stored_bits_per_weight_equals_those_of_linears() -> None:
    scheme = Scheme("W3A16g32", rules=(Rule("*.up", "W4A16g64", symmetric=True),))
    linears = [random_linear(scheme.grid_of(name), *shape, 0) for name, shape in SHAPES.items()]
    weights = sum(linear.codes.numel() for linear in linears)
    expected = sum(linear.bits_per_weight() * linear.codes.numel() for linear in linears) / weights
    assert stored_bits_per_weight(scheme, SHAPES) == pytest.approx(expected, rel=1e-12)


def test_restate_keeps_other_parts() -> None:
    plain = random_linear(Grid(3, 32), 4, 96, 0)
    sparse = Outliers.from_dense(torch.eye(4, 96))
    linear = QuantizedLinear(plain.grid, plain.codes, plain.scale, plain.zero_point, sparse)
    assert restate(linear, Grid(4, 32, True)).outliers is sparse
    assert restate(linear, linear.grid) is linear
    for other in (Grid(2, 32), Grid(4, 32), Grid(4, 64, True), Grid(4, -1, True)):
        with pytest.raises(ValueError, match="does not hold weights on Grid.bits=3"):
            restate(linear, other)
