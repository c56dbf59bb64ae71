# SPDX-License-Identifier: Apache-2.0
"""Coordinate descent on the reconstruction error of a linear layer, in blocks (QuantEase, arXiv 2309.01885).

With weights W, quantized weights W^, residual D = W - W^ and Gram matrix S = X X^T of the layer's inputs,

    f(W^) = ||W X - W^ X||^2 = tr(D S D^T)

and, all else fixed, column j of W^ is best at (Algorithm 2; one parabola per row, so rounding it is exact)

    u_j = W^_j + (D S)_j / S_jj,        W^_j <- Q(u_j)

One sweep visits the columns in order, each with the newest values of all others. Rows are independent.

**The blocked form** computes the same numbers, almost all of them in matrix products. For each block b of columns:

1. ``G = D S_b`` with the residuals as they are now: one product (``omniq.kernels.products``). This is half the
   negative gradient.
2. Column by column, ``u = W^_j + G_j / S_jj``, round, and the step ``e_j = W^_j(old) - W^_j(new)`` moves the gradient
   of the columns to its right in the block by ``e_j S_jk``. Done in sub-blocks: a product brings all earlier steps to a
   sub-block, only inside it the columns go one by one. Steps overwrite the gradients that they came from.

**Relaxed sweeps** leave columns unrounded: Gauss-Seidel on the unconstrained problem, from which the next rounded sweep
starts in a better basin. Their step 2 is a triangular system, ``E L_bb^T = -G`` with L the lower triangle of S
including the diagonal, so it becomes a product with a B x B inverse computed once. In a large layer that is done a few
rows of the inverse at a time, which need less room, and no columns to the right of their own.

**The objective is free**: a step changes a row's error by exactly ``S_jj ((new - u)^2 - (old - u)^2)``.

Differences from the published code: the residual is kept instead of two weight-sized products (``P - P^``), so that
TF32 costs nothing; S is used as it is, neither scaled nor copied; dead columns by a relative threshold
(``omniq.kernels.layer_problem``); supported coordinates of a sparse part (``mask``) are not rounded and otherwise like
all others, where the published outlier variant never writes what it rounds.

Inside a sweep nothing waits for the device: a sweep can be captured in a CUDA graph. Beside the layer itself it needs
room for ``B o`` numbers and 8 MiB.

Shapes: ``o`` output features, ``i`` input features, ``G`` groups, ``B`` columns of a block, ``n`` of a sub-block.
"""

import functools
from importlib.util import find_spec
from typing import Literal

import torch
from torch import Tensor

from omniq.kernels import layer_problem as layer
from omniq.kernels.layer_problem import Problem
from omniq.kernels.matmul_precision import matmul_precision
from omniq.kernels.products import products_of

Backend = Literal["auto", "torch", "triton"]

INNER = 32  # columns that go one by one between two small products
_ROOM = 2**21  # numbers: steps of a relaxed block at a time


def sweep_(problem: Problem, residual: Tensor, rounded: bool, backend: Backend = "auto") -> tuple[Tensor, Tensor]:
    """One sweep in place.

    Args:
        residual: ``W - W^``, contiguous ``[i, o]``, 0 in dead columns (``to_residual_``); overwritten.
        rounded: False for a relaxed sweep.
        backend: what rounds the columns of a block; by default Triton (3.3 or newer) on CUDA where it is installed.
            Both compute the same numbers up to the order of float32 sums.

    Returns:
        how many coordinates moved by more than half a step of the grid, int64 scalar, supported ones not counted; and
        the change of each row's objective, float64 ``[o]``, never positive if the sweep is relaxed or starts on the
        grid. Both stay on the device.
    """
    outputs = residual.shape[1]
    changed = torch.zeros((), dtype=torch.int64, device=residual.device)
    gain = torch.zeros(outputs, dtype=torch.float64, device=residual.device)
    work = residual.new_empty(problem.block, outputs)
    fused = _is_fused(residual, backend)
    with matmul_precision(problem.precision, residual.device):
        products = products_of(problem, residual, fused)
        for number, columns in enumerate(problem.blocks()):
            gradient = products.gradient(columns, work[: columns.stop - columns.start])
            if not rounded:
                _relax_block(problem, residual, gradient, number, columns, gain, fused)
            elif fused:
                from omniq.kernels.coordinate_descent_triton import round_block as round_block_fused

                round_block_fused(problem, residual, gradient, columns, changed, gain)
            else:
                round_block(problem, residual, gradient, columns, changed, gain)
            products.close(columns)
        products.finish()
    return changed, gain


def _is_fused(tensor: Tensor, backend: Backend) -> bool:
    return backend == "triton" or (backend == "auto" and tensor.is_cuda and _has_triton())


@functools.cache
def _has_triton() -> bool:
    if find_spec("triton") is None:
        return False
    from triton import __version__

    return tuple(int(part) for part in __version__.split(".")[:2]) >= (3, 3)  # the kernel holds columns in tuples


def _relax_block(
    problem: Problem, residual: Tensor, gradient: Tensor, number: int, columns: slice, gain: Tensor, fused: bool
) -> None:
    size, outputs = gradient.shape
    length = min(size, _ROOM // max(1, outputs) or 1)
    room = gradient.new_empty(length, outputs)
    for low in range(0, size, length):
        high = min(low + length, size)
        triangle = problem.triangles[number, low:high, :high]
        steps = torch.mm(triangle, gradient[:high], out=room[: high - low])  # -E, [n, o]
        here = slice(columns.start + low, columns.start + high)
        if fused:
            from omniq.kernels.coordinate_descent_triton import take_steps as take_steps_fused

            take_steps_fused(problem, residual, steps, here, gain)
        else:
            residual[here] -= steps
            gain -= torch.mv(steps.square_().t(), problem.gram.diagonal()[here])  # to exact minimisers: -S_jj e_j^2


def round_block(
    problem: Problem, residual: Tensor, gradient: Tensor, columns: slice, changed: Tensor, gain: Tensor
) -> None:
    """Step 2 of a rounded sweep: the columns of one block, in order.

    Args:
        residual: ``[i, o]``; its rows ``columns`` are overwritten.
        gradient: ``(S D)_b``, ``[B, o]``; overwritten with the steps.
        columns: which columns these are.
        changed: int64 scalar, added to.
        gain: float64 ``[o]``, added to.
    """
    size = columns.stop - columns.start
    gram = problem.gram[columns, columns]
    for low in range(0, size, INNER):
        high = min(low + INNER, size)
        if low:
            gradient[low:high].addmm_(gram[low:high, :low], gradient[:low])  # rows above ``low`` hold steps by now
        inner = slice(columns.start + low, columns.start + high)
        _round_columns(problem, residual[inner], gradient[low:high], inner, changed, gain)


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
    # Taking rows apart once is cheaper than indexing five tensors in the loop.
    rows = zip(old.unbind(), best.unbind(), new.unbind(), scale.unbind(), zero_point.unbind(), strict=True)
    for t, (was, u, v, s, z) in enumerate(rows):
        if columns.start + t in problem.dead:
            u.copy_(was)
            v.copy_(was)  # no step, so the residual stays 0
        else:
            g = torch.addmv(gradient[t], gradient[:t].t(), gram[t, :t]) if t else gradient[t]
            torch.addcmul(was, g, inverse[t], out=u)
            torch.div(u, s, out=v).round_().add_(z).clamp_(0, problem.max_code).sub_(z).mul_(s)
            if mask is not None:
                torch.where(mask[t], u, v, out=v)
        torch.sub(was, v, out=gradient[t])
    torch.sub(target, new, out=residual)
    moved = gradient.abs() > 0.5 * scale
    changed += (moved if mask is None else moved & ~mask).sum()
    # S_jj ((new - u)^2 - (old - u)^2) as one product, which does not cancel
    difference = gradient * (2 * best - new - old)
    gain += torch.mv(difference.t(), gram.diagonal())


def keep_codes_(problem: Problem, residual: Tensor, rows: Tensor, packed: Tensor, backend: Backend = "auto") -> None:
    """As ``omniq.kernels.layer_problem.keep_codes_``, by Triton where the sweep is."""
    if _is_fused(residual, backend):
        from omniq.kernels.coordinate_descent_triton import keep_codes_ as keep_codes_fused_

        keep_codes_fused_(problem, residual, rows, packed)
    else:
        layer.keep_codes_(problem, residual, rows, packed)
