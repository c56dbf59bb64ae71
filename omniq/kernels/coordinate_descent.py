# SPDX-License-Identifier: Apache-2.0
"""Coordinate descent on the reconstruction error of a linear layer, in blocks (QuantEase, arXiv 2309.01885).

With weights W, quantized weights W^, residual D = W - W^ and Gram matrix S = X X^T of the layer's inputs,

    f(W^) = ||W X - W^ X||^2 = tr(D S D^T)

and, with all other columns fixed, the best column j of W^ is (Algorithm 2; f is one parabola for each row, so rounding
its minimum is exact)

    u_j = W^_j + (D S)_j / S_jj,        W^_j <- Q(u_j)

One sweep visits the columns in order, each with the newest values of all others. Rows are independent.

**The blocked form** computes the same numbers, almost all of them in matrix products. For each block b of columns:

1. ``G = D S_b`` with the current residuals: one product (``omniq.kernels.products``). G is half the negative gradient.
2. Column by column: ``u = W^_j + G_j / S_jj``, round. The step ``e_j = W^_j(old) - W^_j(new)`` changes the gradient of
   the columns to its right in the block by ``e_j S_jk``. This is done in sub-blocks: a product applies all earlier
   steps to a sub-block, and only inside it the columns are visited one by one. Steps overwrite the gradients that they
   came from.

**Relaxed sweeps** leave columns unrounded. They are Gauss-Seidel on the unconstrained problem, and the next rounded
sweep starts from a better basin. Their step 2 is a triangular system, ``E L_bb^T = -G`` with L the lower triangle of S
including the diagonal, so it becomes a product with a B x B inverse that is computed once. In a large layer a few rows
of the inverse are multiplied at a time: they need less memory, and no columns to the right of their own.

**The objective costs nothing extra**: a step changes a row's error by exactly ``S_jj ((new - u)^2 - (old - u)^2)``.

Differences from the published code: the residual is kept instead of two weight-sized products (``P - P^``), so that
TF32 does not lower the quality; S is used as it is, neither scaled nor copied; dead columns are found by a relative
threshold (``omniq.kernels.layer_problem``); coordinates that a sparse part stores (``mask``) are not rounded and are
otherwise treated like all others, where the published outlier variant never writes the values that it rounds.

A sweep never waits for the device, so a CUDA graph can capture it. Besides the layer it needs memory for ``B o``
numbers and 8 MiB.

Shapes: ``o`` output features, ``i`` input features, ``G`` groups, ``B`` columns of a block, ``n`` of a sub-block.
"""

from types import ModuleType

import torch
from torch import Tensor

from omniq.kernels.fused import Backend, implementation, is_descent_fused
from omniq.kernels.layer_problem import Problem
from omniq.kernels.matmul_precision import matmul_precision
from omniq.kernels.products import products_of

_RELAXED_STEPS = 2**21  # numbers: steps of a relaxed block at a time


def sweep_(problem: Problem, residual: Tensor, rounded: bool, backend: Backend = "auto") -> tuple[Tensor, Tensor]:
    """One sweep in place.

    Args:
        problem: the layer.
        residual: ``W - W^``, contiguous ``[i, o]``, 0 in dead columns (``to_residual_``); overwritten.
        rounded: False for a relaxed sweep.
        backend: the implementation that rounds the columns of a block; by default Triton (3.3 or newer) on CUDA where
            it is installed. Both compute the same numbers up to the order of float32 sums.

    Returns:
        the number of coordinates that moved by more than half a step of the grid, int64 scalar, without those of a
        sparse part; and the change of each row's objective, float64 ``[o]``, never positive if the sweep is relaxed or
        starts on the grid. Both stay on the device.
    """
    outputs = residual.shape[1]
    changed = torch.zeros((), dtype=torch.int64, device=residual.device)
    gain = torch.zeros(outputs, dtype=torch.float64, device=residual.device)
    work = residual.new_empty(problem.block, outputs)
    fused = is_descent_fused(residual, backend)
    kernels = implementation("coordinate_descent", fused)
    with matmul_precision(problem.precision, residual.device):
        products = products_of(problem, residual, fused)
        for number, columns in enumerate(problem.blocks()):
            gradient = products.gradient(columns, work[: columns.stop - columns.start])
            if rounded:
                kernels.round_block(problem, residual, gradient, columns, changed, gain)
            else:
                _relax_block(problem, residual, gradient, number, columns, gain, kernels)
            products.refresh(columns)
        products.finish()
    return changed, gain


def keep_codes_(problem: Problem, residual: Tensor, rows: Tensor, packed: Tensor, backend: Backend = "auto") -> None:
    """Keep the codes of some rows, see ``omniq.kernels.coordinate_descent_torch.keep_codes_``."""
    kernels = implementation("coordinate_descent", is_descent_fused(residual, backend))
    kernels.keep_codes_(problem, residual, rows, packed)


def _relax_block(
    problem: Problem, residual: Tensor, gradient: Tensor, number: int, columns: slice, gain: Tensor, kernels: ModuleType
) -> None:
    """Step 2 of a relaxed sweep: block ``number``, a few rows of the triangle's inverse at a time."""
    size, outputs = gradient.shape
    length = min(size, _RELAXED_STEPS // max(1, outputs) or 1)
    steps = gradient.new_empty(length, outputs)
    for low in range(0, size, length):
        high = min(low + length, size)
        triangle = problem.triangles[number, low:high, :high]
        negative = torch.mm(triangle, gradient[:high], out=steps[: high - low])  # -E, [n, o]
        kernels.take_steps(problem, residual, negative, slice(columns.start + low, columns.start + high), gain)
