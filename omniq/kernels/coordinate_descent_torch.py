# SPDX-License-Identifier: Apache-2.0
"""The torch implementation of the parts of ``omniq.kernels.coordinate_descent`` that Triton fuses: the reference.

Shapes: ``o`` output features, ``i`` input features, ``B`` columns of a block, ``n`` of a sub-block.
"""

import torch
from torch import Tensor

from omniq.kernels.layer_problem import SLICE, Problem, nearest

SUB_BLOCK = 32  # columns that are visited one by one between two small products


def round_block(
    problem: Problem, residual: Tensor, gradient: Tensor, columns: slice, changed: Tensor, gain: Tensor
) -> None:
    """Step 2 of a rounded sweep: the columns of one block, in order.

    Args:
        problem: the layer.
        residual: ``[i, o]``; its rows ``columns`` are overwritten.
        gradient: ``(S D)_b``, ``[B, o]``; overwritten with the steps.
        columns: the columns of the block.
        changed: int64 scalar, added to.
        gain: float64 ``[o]``, added to.
    """
    size = columns.stop - columns.start
    gram = problem.gram[columns, columns]
    for low in range(0, size, SUB_BLOCK):
        high = min(low + SUB_BLOCK, size)
        if low:
            gradient[low:high].addmm_(gram[low:high, :low], gradient[:low])  # rows above ``low`` hold steps by now
        inner = slice(columns.start + low, columns.start + high)
        _round_columns(problem, residual[inner], gradient[low:high], inner, changed, gain)


def take_steps(problem: Problem, residual: Tensor, steps: Tensor, columns: slice, gain: Tensor) -> None:
    """Finish a relaxed block after its product: ``D_b += E``, and ``-S_jj e_j^2`` is added to the gains.

    Args:
        problem: the layer.
        residual: ``[i, o]``; its rows ``columns`` are overwritten.
        steps: ``-E``, ``[n, o]``; may be overwritten.
        columns: the columns of the steps.
        gain: float64 ``[o]``, added to.
    """
    residual[columns] -= steps
    gain -= torch.mv(steps.square_().t(), problem.gram.diagonal()[columns])  # to exact minimisers: -S_jj e_j^2


def keep_codes_(problem: Problem, residual: Tensor, rows: Tensor, packed: Tensor) -> None:
    """Overwrite the packed codes of some rows of the layer with those of the iterate.

    Args:
        problem: the layer.
        residual: ``[i, o]``, after a rounded sweep.
        rows: the rows of the layer to overwrite, bool ``[o]``.
        packed: uint8, as ``omniq.kernels.layer_problem.empty_codes`` makes it.
    """
    per_byte = problem.codes_per_byte
    for columns in problem.blocks(SLICE):
        codes = nearest(problem, residual, columns).to(torch.uint8)
        low, high = codes[::per_byte], codes[1:] if per_byte == 1 else codes[1::2]
        if per_byte == 2:
            low[: len(high)] |= high << 4
        here = packed[columns.start // per_byte :][: len(low)]
        torch.where(rows, low, here, out=here)


def _round_columns(
    problem: Problem, residual: Tensor, gradient: Tensor, columns: slice, changed: Tensor, gain: Tensor
) -> None:
    """The sequential core; ``residual`` and ``gradient`` are ``[n, o]``, the rows of these columns only."""
    target, inverse, gram = problem.target[columns], problem.inverse[columns], problem.gram[columns, columns]
    group = problem.group_index[columns]
    scale, zero_point = problem.scale[group], problem.zero_point[group]  # [n, o]
    mask = None if problem.mask is None else problem.mask[columns]
    old = target - residual
    best, new = torch.empty_like(old), torch.empty_like(old)  # u before rounding, W^ after it
    # Unbinding the rows once is cheaper than indexing five tensors in the loop.
    rows = zip(old.unbind(), best.unbind(), new.unbind(), scale.unbind(), zero_point.unbind(), strict=True)
    for t, (before, u, v, s, z) in enumerate(rows):
        if columns.start + t in problem.dead:
            u.copy_(before)
            v.copy_(before)  # no step, so the residual stays 0
        else:
            g = torch.addmv(gradient[t], gradient[:t].t(), gram[t, :t]) if t else gradient[t]
            torch.addcmul(before, g, inverse[t], out=u)
            torch.div(u, s, out=v).round_().add_(z).clamp_(0, problem.max_code).sub_(z).mul_(s)
            if mask is not None:
                torch.where(mask[t], u, v, out=v)
        torch.sub(before, v, out=gradient[t])
    torch.sub(target, new, out=residual)
    moved = gradient.abs() > 0.5 * scale
    changed += (moved if mask is None else moved & ~mask).sum()
    # S_jj ((new - u)^2 - (old - u)^2) as one product, which does not cancel
    difference = gradient * (2 * best - new - old)
    gain += torch.mv(difference.t(), gram.diagonal())
