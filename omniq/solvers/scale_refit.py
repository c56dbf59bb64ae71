# SPDX-License-Identifier: Apache-2.0
"""Better scales for codes that are already chosen: least squares, one group at a time.

With codes fixed, ``W^ = s_g c`` inside group g (``c = q - z``) is linear in the scale, and the row's error is a
parabola in its change t:

    f(s_g + t) = f(s_g) - 2 t c.G_g + t^2 c S_gg c,      G = D S,      minimum at   t = c.G_g / c S_gg c

**Steps** for each group, with the groups before it already refitted: (1) compute t; (2) round the new scale to its
storage dtype; (3) keep it only where it is positive and the row's error falls, so that no row gets worse. Zero points
do not change.

This is no part of the paper (arXiv 2309.01885): the published code never changes a grid during descent.

Shapes: ``o`` output features, ``i`` input features, ``G`` groups, ``g`` columns of a group. Weights are stored
transposed, ``[i, o]``.
"""

from dataclasses import replace

import torch
from torch import Tensor

from omniq.grid.affine import Grid
from omniq.kernels.layer_problem import Problem
from omniq.kernels.matmul_precision import matmul_precision


def refit_scales_(problem: Problem, residual: Tensor, grid: Grid) -> tuple[Problem, Tensor]:
    """Refit the scales after a rounded sweep.

    Args:
        problem: the layer.
        residual: ``[i, o]``, on the grid except where masked; updated in place.
        grid: the storage dtype of scales.

    Returns:
        the problem with its new scales, and the change of each row's objective, float64 ``[o]``, never positive.
    """
    scale = problem.scale.clone()
    gain = torch.zeros(residual.shape[1], dtype=torch.float64, device=residual.device)
    with matmul_precision(problem.precision, residual.device):
        for group in range(len(scale)):
            columns = (problem.group_index == group).nonzero().flatten()
            if len(columns):
                gain += _refit_group(problem, residual, scale[group], columns, grid)
    return replace(problem, scale=scale), gain


def _refit_group(problem: Problem, residual: Tensor, scale: Tensor, columns: Tensor, grid: Grid) -> Tensor:
    """One group; ``scale`` ``[o]`` and the group's rows of ``residual`` are overwritten."""
    gram = problem.gram[columns]  # [g, i]
    codes = ((problem.target[columns] - residual[columns]) / scale).round_()  # c, [g, o]
    codes.mul_((problem.inverse[columns] > 0)[:, None])
    if problem.mask is not None:
        codes.masked_fill_(problem.mask[columns], 0)
    slope = (codes * (gram @ residual)).sum(0)
    curvature = (codes * (gram[:, columns] @ codes)).sum(0)
    wanted = scale + slope / curvature.clamp_min(torch.finfo(curvature.dtype).tiny)
    move = grid.store(wanted) - scale
    change = move * (move * curvature - 2 * slope)
    better = (change < 0) & (wanted > 0)
    move = torch.where(better, move, 0)
    scale += move
    residual[columns] -= codes * move
    return torch.where(better, change, 0).double()
