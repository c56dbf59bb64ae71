# SPDX-License-Identifier: Apache-2.0
"""Refitted scales give the least error of each row, for fixed codes."""

import torch

from omniq.grid.affine import Grid
from omniq.kernels.coordinate_descent import sweep_
from omniq.kernels.layer_problem import (
    objective,
    prepare,
    to_residual_,
)
from omniq.solvers.scale_refit import refit_scales_
from tests.helpers.descent import codes_of, small_layer
from tests.helpers.synthetic_layer import fit_grid


def test_refit_scales_finds_least_error_of_each_row() -> None:
    weight, gram = (tensor.double() for tensor in small_layer())
    grid = Grid(3, scale_dtype=torch.float64)
    scale, zero_point, _ = fit_grid(weight, grid)
    problem = prepare(weight, gram, scale, zero_point, 3, precision="float64")
    residual = torch.zeros_like(problem.target)
    sweep_(problem, residual, True)
    before, codes = objective(problem, residual), codes_of(problem, residual).double()
    problem, gain = refit_scales_(problem, residual, grid)
    after = objective(problem, residual)
    torch.testing.assert_close(after, before + gain)
    assert (gain <= 0).all()
    torch.testing.assert_close(problem.target - residual, (codes - problem.zero_point) * problem.scale)
    for share in (0.999, 1.001):
        moved = problem.target - (codes - problem.zero_point) * problem.scale * share
        assert (objective(problem, moved) >= after).all()


def test_refit_scales_toward_negative_scale_keeps_old() -> None:
    """Weights opposite to their codes want a negative one; the least there is would lower their error, too."""
    _, gram = small_layer()
    values = torch.randint(-3, 4, (40, 72), generator=torch.Generator().manual_seed(0)) * 0.25
    scale, zero_point = torch.full((40, 1), 0.25), torch.full((40, 1), 4.0)
    problem = prepare(-values, gram, scale, zero_point, 3)
    residual = to_residual_(problem, values.t().clone(memory_format=torch.contiguous_format))
    refitted, gain = refit_scales_(problem, residual, Grid(3))
    assert torch.equal(refitted.scale.t(), scale)
    assert not gain.any()
