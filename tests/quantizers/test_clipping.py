# SPDX-License-Identifier: Apache-2.0
"""Clippings that learn: their grids at the start, and their gradients against float64 autograd written out here."""

from typing import Any

import pytest
import torch
from torch import Tensor

from omniq.grid.affine import Grid
from omniq.kernels.scaled_weight import ScaledWeight
from omniq.quantizers.absolute import LSQ, PACT
from omniq.quantizers.clipping import LWC, Clipping, MinMax, RangeEstimator, Searched

GRIDS = [Grid(4, scale_dtype=torch.float32), Grid(3, 8, scale_dtype=torch.float32), Grid(3, 8, True, torch.float32)]
METHODS: list[Clipping] = [LWC(), PACT(), LSQ(), MinMax(), Searched(), LWC(Searched()), PACT(Searched())]


def drawn(seed: int = 0) -> tuple[Tensor, Tensor]:
    """A weight and what weights its error."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(6, 24, generator=generator), torch.rand(24, generator=generator) + 0.1


@pytest.mark.parametrize("grid", GRIDS)
@pytest.mark.parametrize("method", METHODS)
def test_clipping_fake_quantized_weight_equals_final_grid(grid: Grid, method: Clipping) -> None:
    """The fake-quantized weight is the dequantized one of the final grid, at the start and away from it."""
    weight, second_moment = drawn()
    clip = method.build(weight, grid, second_moment if method.needs_second_moment else None)
    for step in range(2):
        for given in (weight, ScaledWeight(weight)):
            trained = clip(given, torch.float32)
            scale, zero_point = clip.grid_of(weight)
            final = grid.dequantize(grid.quantize(weight, scale, zero_point), scale, zero_point)
            torch.testing.assert_close(trained, final, rtol=1e-5, atol=1e-6)
        with torch.no_grad():
            for value in clip.parameters():
                value -= 0.1 * (step + 1)
    clip.reset()
    fresh = method.build(weight, grid, second_moment)
    torch.testing.assert_close(clip(weight, torch.float32), fresh(weight, torch.float32))


@pytest.mark.parametrize("method", METHODS)
def test_clipping_final_scales_are_storable(method: Clipping) -> None:
    """Codes are chosen on them: a scale that is rounded only later would belong to other codes."""
    weight, second_moment = drawn()
    clip = method.build(weight, Grid(3, 8), second_moment)
    with torch.no_grad():
        for value in clip.parameters():
            value -= 0.123
    scale, _ = clip.grid_of(weight)
    assert scale.dtype == torch.float32
    assert torch.equal(scale, scale.half().float())


@pytest.mark.parametrize("method", [MinMax(), Searched()])
def test_range_estimator_build_has_fixed_range(method: RangeEstimator) -> None:
    weight, second_moment = drawn()
    for grid in GRIDS:
        clip = method.build(weight, grid, second_moment)
        assert not [value for value in clip.parameters() if value.requires_grad]
        expected = grid.fit(*method.range(weight, grid, second_moment))
        for found, wanted in zip(clip.grid_of(weight), expected, strict=True):
            torch.testing.assert_close(found, wanted, rtol=1e-5, atol=0)


def gradients(method: Clipping, grid: Grid, weight: Tensor, towards: Tensor) -> tuple[Any, Tensor]:
    weight = weight.clone().requires_grad_()
    clip = method.build(weight.detach(), grid, None)
    with torch.no_grad():
        for value in clip.parameters():
            value *= 0.8  # so that something is clipped
    (clip(ScaledWeight(weight), torch.float32) * towards).sum().backward()
    return clip, weight.grad


@pytest.mark.parametrize("grid", GRIDS)
def test_lsq_gradient_equals_paper(grid: Grid) -> None:
    """Inside: round(w / s) - w / s; beyond an end: the code there."""
    weight, _ = drawn(1)
    towards = torch.randn(weight.shape, generator=torch.Generator().manual_seed(2))
    clip, d_weight = gradients(LSQ(), grid, weight, towards)
    start, zero = (value.double().unsqueeze(-1) for value in (clip.start, clip.zero_point))
    steps = grid.split(weight.double()) / (0.8 * start)
    low, high = -zero, grid.max_code - zero
    inside = (steps.round() >= low) & (steps.round() <= high)
    slope = torch.where(inside, steps.round() - steps, steps.round().clamp(low, high))
    expected = (slope * grid.split(towards.double())).sum(-1) * clip.start
    torch.testing.assert_close(clip.factors.grad.double(), expected, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(d_weight, towards * inside.flatten(-2), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("grid", GRIDS)
def test_pact_gradient_equals_paper(grid: Grid) -> None:
    """Each weight beyond a threshold pulls at it, none inside does; a symmetric grid has the larger one twice."""
    weight, _ = drawn(1)
    towards = torch.randn(weight.shape, generator=torch.Generator().manual_seed(2))
    clip, d_weight = gradients(PACT(), grid, weight, towards)
    factors = torch.full(clip.start.shape, 0.8, dtype=torch.float64, requires_grad=True)
    lo, hi = (factors * clip.start).unsqueeze(-1)
    if grid.symmetric:
        lo, hi = -torch.maximum(-lo, hi), torch.maximum(-lo, hi)
    groups, pull = grid.split(weight), grid.split(towards)
    (torch.where(groups < lo, lo, torch.where(groups > hi, hi, groups)) * pull).sum().backward()
    torch.testing.assert_close(clip.factors.grad.double(), factors.grad, rtol=1e-5, atol=1e-6)
    inside = ((groups >= lo) & (groups <= hi)).flatten(-2)
    torch.testing.assert_close(d_weight, towards * inside, rtol=1e-5, atol=1e-6)


def test_pact_and_lsq_negative_factors_keep_positive_scales() -> None:
    weight, _ = drawn()
    for method in (PACT(), LSQ()):
        clip = method.build(weight, GRIDS[0], None)
        with torch.no_grad():
            for value in clip.parameters():
                value.fill_(-3.0)
        assert clip(weight, torch.float32).isfinite().all()
        assert (clip.grid_of(weight)[0] > 0).all()
