# SPDX-License-Identifier: Apache-2.0
"""The affine grid: its invariants for any weights, and the formulas against float64."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from omniq.errors import UserError
from omniq.grid.affine import Grid

DTYPES = (torch.float16, torch.bfloat16, torch.float32)
WIDTH = 12


@st.composite
def grids(draw: st.DrawFn) -> Grid:
    return Grid(
        draw(st.integers(2, 8)), draw(st.sampled_from((-1, 3, 4))), draw(st.booleans()), draw(st.sampled_from(DTYPES))
    )


@st.composite
def weights(draw: st.DrawFn) -> Tensor:
    """Float32 ``[3, 12]`` of any size that a scale can follow, with rows of one sign, constant, or all zero."""
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**16)))
    size = draw(st.sampled_from((1e-8, 1e-6, 1e-2, 1.0, 30.0)))
    weight = size * torch.randn(3, WIDTH, generator=generator)
    for row in range(3):
        change = draw(st.sampled_from(("nothing", "positive", "negative", "zero", "constant", "outlier")))
        if change in ("positive", "negative"):
            weight[row] = weight[row].abs() * (1 if change == "positive" else -1)
        elif change == "zero":
            weight[row] = 0
        elif change == "constant":
            weight[row] = weight[row, 0]
        elif change == "outlier":
            weight[row, 5] *= 50
    return weight


def rounded(grid: Grid, weight: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Scale, zero point, codes, and the weight they stand for."""
    scale, zero_point = grid.fit(*grid.range(weight))
    codes = grid.quantize(weight, scale, zero_point)
    return scale, zero_point, codes, grid.dequantize(codes, scale, zero_point)


@settings(max_examples=60, deadline=None)
@given(grids(), weights())
def test_grid_of_random_weights_holds_invariants(grid: Grid, weight: Tensor) -> None:
    scale, zero_point, codes, back = rounded(grid, weight)
    groups = 1 if grid.group_size == -1 else WIDTH // grid.group_size
    assert scale.shape == zero_point.shape == (3, groups)
    assert (scale > 0).all()
    assert scale.isfinite().all()
    assert torch.equal(scale, scale.to(grid.scale_dtype).to(scale.dtype))  # already what will be stored
    assert torch.equal(zero_point, zero_point.round())
    assert zero_point.min() >= 0
    assert zero_point.max() <= grid.max_code
    assert codes.dtype == torch.uint8
    assert codes.max() <= grid.max_code
    nothing = torch.zeros_like(weight)  # zero is a point of every grid
    assert torch.equal(grid.dequantize(grid.quantize(nothing, scale, zero_point), scale, zero_point), nothing)
    assert torch.equal(grid.quantize(back, scale, zero_point), codes)  # rounding what is rounded changes nothing


@settings(max_examples=60, deadline=None)
@given(grids(), weights())
def test_grid_error_inside_range_is_at_most_half_step(grid: Grid, weight: Tensor) -> None:
    scale, zero_point, _, back = rounded(grid, weight)
    s, z = grid.expand(scale, WIDTH).double(), grid.expand(zero_point, WIDTH).double()
    inside = (weight >= -z * s) & (weight <= (grid.max_code - z) * s)
    error = (weight.double() - back.double()).abs()
    slack = 1e-6 * weight.double().abs() + 1e-6 * s  # of float32
    assert (error[inside] <= (s / 2 + slack)[inside]).all()
    # Outside lies only what rounding the scale (by half a step of its dtype) and the zero point cut off.
    info = torch.finfo(grid.scale_dtype)
    off = grid.max_code * info.eps * s.clamp(min=info.tiny) / 2
    assert (error <= off + (1 if grid.symmetric else 0.5) * s + slack).all()


@settings(max_examples=60, deadline=None)
@given(grids(), weights())
def test_grid_rounding_equals_float64(grid: Grid, weight: Tensor) -> None:
    """The scale comes from the extremes, zero point and codes from the stored scale. Ties are skipped."""
    scale, zero_point, codes, back = rounded(grid, weight)
    for row in range(3):
        parts = weight[row].double().reshape(scale.shape[1], -1)
        for group, part in enumerate(parts):
            lo, hi = min(float(part.min()), 0.0), max(float(part.max()), 0.0)
            s, z = float(scale[row, group]), float(zero_point[row, group])
            exact = 2 * max(-lo, hi) / grid.max_code if grid.symmetric else (hi - lo) / grid.max_code
            if exact > torch.finfo(grid.scale_dtype).tiny:
                assert abs(s - exact) <= (torch.finfo(grid.scale_dtype).eps / 2 + 1e-6) * exact
            if grid.symmetric:
                assert z == 2 ** (grid.bits - 1)
            elif abs(-lo / s % 1 - 0.5) > 1e-4:
                assert z == min(round(-lo / s), grid.max_code)
            found = codes[row].reshape(scale.shape[1], -1)[group]
            for w, q in zip(part.tolist(), found.tolist(), strict=True):
                if abs(w / s % 1 - 0.5) > 1e-4:
                    assert q == min(max(round(w / s) + z, 0), grid.max_code)
    assert torch.equal(back, (codes.float() - grid.expand(zero_point, WIDTH)) * grid.expand(scale, WIDTH))


def test_grid_of_float64_weight_computes_in_float64() -> None:
    scale, zero_point, codes, back = rounded(Grid(3, 4), torch.randn(2, 8, dtype=torch.float64))
    assert (scale.dtype, zero_point.dtype, codes.dtype, back.dtype) == (
        *[torch.float64] * 2,
        torch.uint8,
        torch.float64,
    )


def test_grid_quantize_ties_round_to_even() -> None:
    """0.5 and 2.5 steps are rounded down, 1.5 and 3.5 up."""
    grid, scale, zero = Grid(4, scale_dtype=torch.float32), torch.ones(1, 1), torch.zeros(1, 1)
    assert grid.quantize(torch.tensor([[0.5, 1.5, 2.5, 3.5]]), scale, zero).tolist() == [[0, 2, 2, 4]]


def test_grid_groups_are_consecutive_inputs() -> None:
    """The range of a group depends on its own weights only; a per-channel grid has one group."""
    weight = torch.tensor([[1.0, -1, 2, -2, 4, -4], [8, 0, 0, -8, 16, 0]])
    grid = Grid(8, 2)
    lo, hi = grid.range(weight)
    assert hi.tolist() == [[1, 2, 4], [8, 0, 16]]
    assert lo.tolist() == [[-1, -2, -4], [0, -8, 0]]
    assert grid.split(weight)[1].tolist() == [[8, 0], [0, -8], [16, 0]]
    assert grid.expand(hi, 6)[1].tolist() == [8, 8, 0, 0, 16, 16]
    assert Grid(8).range(weight)[1].tolist() == [[4], [16]]
    assert grid.groups(6) == 3
    assert Grid(8).groups(6) == 1


def test_grid_symmetric_has_zero_in_middle() -> None:
    """The scale comes from the larger side, whose extreme lies half a step beyond the last code."""
    grid = Grid(4, symmetric=True, scale_dtype=torch.float32)
    scale, zero_point, codes, _ = rounded(grid, torch.tensor([[-3.0, 0, 7.5]]))
    assert scale.item() == 1.0
    assert zero_point.item() == 8
    assert codes.tolist() == [[5, 8, 15]]


def test_grid_fit_stretches_range_to_zero() -> None:
    scale, zero_point = Grid(2, scale_dtype=torch.float32).fit(torch.tensor([[1.0]]), torch.tensor([[3.0]]))
    assert (scale.item(), zero_point.item()) == (1.0, 0.0)


def test_grid_fit_zero_point_of_subnormal_scale_stays_inside() -> None:
    """A stored scale that is subnormal in float16 may be a third too small."""
    scale, zero_point = Grid(4).fit(torch.tensor([[-15 * 1.4 * 2.0**-24]]), torch.zeros(1, 1))
    assert scale.item() == 2.0**-24
    assert zero_point.item() == 15


@pytest.mark.parametrize("dtype", DTYPES)
def test_grid_store_extreme_scales_stay_positive_and_finite(dtype: torch.dtype) -> None:
    """Weights too small or too large for the storage dtype get a positive, finite scale that it can hold."""
    grid = Grid(2, scale_dtype=dtype)
    for size in (0.0, 1e-44, 1e-30, 1e30, 3e38):
        scale = grid.store(torch.tensor([size]))
        assert 0 < scale.item() < float("inf")
        assert torch.equal(scale.to(dtype).float(), scale)


@pytest.mark.parametrize("bits", [-1, 0, 1, 9, 16])
def test_grid_bits_out_of_range_are_refused(bits: int) -> None:
    with pytest.raises(UserError, match=rf"weight bits {bits} are outside 2\.\.8: choose"):
        Grid(bits)


@pytest.mark.parametrize("size", [0, -2])
def test_grid_unusable_group_size_is_refused(size: int) -> None:
    with pytest.raises(UserError, match=f"group size {size} is not usable"):
        Grid(4, size)


def test_grid_check_width_names_sizes_that_divide() -> None:
    Grid(4, 64).check_width(576, "model.layers.0.mlp.down_proj")
    Grid(4).check_width(577, "any")
    with pytest.raises(UserError) as caught:
        Grid(4, 128).check_width(576, "model.layers.0.self_attn.q_proj")
    assert str(caught.value) == (
        "group size 128 does not divide the 576 inputs of model.layers.0.self_attn.q_proj: "
        "use 16, 32, 48, 64, 96, 144, 192, 288, 576, which divide the inputs, or -1 for per-channel scales"
    )
    with pytest.raises(UserError, match="use -1 for per-channel scales, because no multiple of 16 divides the inputs"):
        Grid(4, 16).check_width(50, "x")


@given(st.lists(st.integers(1, 40).map(lambda n: 16 * n), min_size=1, max_size=4), st.integers(1, 200))
@settings(max_examples=50)
def test_grid_check_width_offers_sizes_that_fit_all_widths(widths: list[int], size: int) -> None:
    """SmolLM2-135M, for example, has 576 inputs in most linears and 1536 in ``down_proj``."""
    if all(width % size == 0 for width in widths):
        return
    offending = next(width for width in widths if width % size)
    with pytest.raises(UserError) as caught:
        Grid(4, size).check_width(offending, "x", widths)
    text = str(caught.value)
    offered = [int(number) for number in text.partition(" are ")[2].partition(", or -1")[0].split(", ")]
    assert offered == [n for n in range(16, min(widths) + 1, 16) if all(width % n == 0 for width in widths)]
    assert ("that do so everywhere are" in text) == any(w % offending for w in widths)
