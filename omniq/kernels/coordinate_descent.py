# SPDX-License-Identifier: Apache-2.0
"""Coordinate descent on the reconstruction error of a linear layer, in blocks (QuantEase, arXiv 2309.01885).

With weights W, quantized weights W^, residual D = W - W^ and Gram matrix S = X X^T of the layer's inputs,

    f(W^) = ||W X - W^ X||^2 = tr(D S D^T)

and, all else fixed, column j of W^ is best at (Algorithm 2; one parabola per row, so rounding it is exact)

    u_j = W^_j + (D S)_j / S_jj,        W^_j <- Q(u_j)

One sweep visits the columns in order, each with the newest values of all others. Rows are independent.

**The blocked form** computes the same numbers, almost all of them in matrix products. For each block b of columns:

1. ``G = D S_b`` with the residuals as they are now: one product. This is half the negative gradient.
2. Column by column, ``u = W^_j + G_j / S_jj``, round, and the step ``e_j = W^_j(old) - W^_j(new)`` moves the gradient of
   the columns to its right in the block by ``e_j S_jk``. Done in sub-blocks: a product brings all earlier steps to a
   sub-block, only inside it the columns go one by one. Steps overwrite the gradients that they came from.

**Relaxed sweeps** leave columns unrounded: Gauss-Seidel on the unconstrained problem, from which the next rounded sweep
starts in a better basin. Their step 2 is a triangular system, ``E L_bb^T = -G`` with L the lower triangle of S including the
diagonal, so it becomes a product with a B x B inverse computed once.

**The objective is free**: a step changes a row's error by exactly ``S_jj ((new - u)^2 - (old - u)^2)``.

Differences from the published code: the residual is kept instead of two weight-sized products (``P - P^``), so that TF32
costs nothing; S is used as it is, neither scaled nor copied; a column whose S_jj is below 1e-8 of the mean counts as dead
(the published test is ``== 0``, and relaxed sweeps blow up just above it). A dead column is on its own: rounded to the
nearest, without effect on others. Supported coordinates of a sparse part are not rounded and otherwise like all others,
where the published outlier variant forgets to write what it rounds.

Inside a sweep nothing waits for the device: a sweep can be captured in a CUDA graph.

Shapes: ``o`` output features, ``i`` input features, ``G`` groups, ``B`` columns of a block. Weights are held
transposed, ``[i, o]``, so that a column is contiguous.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Literal, NamedTuple

import torch
from torch import Tensor

Precision = Literal["float32", "tf32", "float64"]
Backend = Literal["auto", "torch", "triton"]

DEAD = 1e-8  # of the mean diagonal: below it, float32 sums of squares of half-precision inputs are noise
BLOCK = 256  # columns a product: enough arithmetic per byte of D for TF32 on an H100 (a balance of 120 flop a byte)
INNER = 32  # columns that go one by one between two small products


@dataclass(frozen=True)
class Problem:
    """What stays the same from sweep to sweep; build it with ``prepare``.

    Args:
        target: original weights, ``[i, o]``.
        gram: ``[i, i]``, symmetric.
        scale, zero_point: ``[G, o]``.
        group_index: group of each column, int64 ``[i]``.
        levels: largest code.
        inverse: ``1 / S_jj``, 0 for dead columns, ``[i]``.
        dead: columns that no input reaches.
        triangles: inverse of the lower triangle of each diagonal block, ``[ceil(i / B), B, B]``; zero for dead columns.
        mask: coordinates that are not rounded, bool ``[i, o]``, or None.
        precision: of the products of float32 tensors on CUDA; float64 tensors are always multiplied exactly so.
    """

    target: Tensor
    gram: Tensor
    scale: Tensor
    zero_point: Tensor
    group_index: Tensor
    levels: int
    inverse: Tensor
    dead: frozenset[int]
    triangles: Tensor
    mask: Tensor | None
    precision: Precision

    @property
    def block(self) -> int:
        """Columns of a block, ``B``."""
        return self.triangles.shape[-1]

    def blocks(self) -> Iterator[slice]:
        """The columns of each block in turn."""
        width = self.target.shape[0]
        for start in range(0, width, self.block):
            yield slice(start, min(start + self.block, width))


class Sweep(NamedTuple):
    """The outcome of one sweep.

    ``values`` ``[o, i]``; nearest ``codes`` uint8 ``[o, i]``; ``changed``: how many coordinates moved by more than half a
    step of the grid, int64 scalar; ``gain``: change of each row's objective, float64 ``[o]``, never positive for a rounded
    sweep that starts on the grid.
    """

    values: Tensor
    codes: Tensor
    changed: Tensor
    gain: Tensor


def prepare(
    target: Tensor,
    gram: Tensor,
    scale: Tensor,
    zero_point: Tensor,
    bits: int,
    *,
    group_index: Tensor | None = None,
    mask: Tensor | None = None,
    precision: Precision = "float32",
    block: int = BLOCK,
) -> Problem:
    """Lay a layer out for sweeping; tensors that already lie right are not copied.

    Args:
        target: original weights, ``[o, i]``; no copy if it is the transpose of a contiguous tensor.
        gram: ``[i, i]``, symmetric and finite.
        scale, zero_point: ``[o, G]``.
        bits: of a code.
        group_index: group of each column, int64 ``[i]``; by default equal runs of neighbours.
        mask: bool ``[o, i]``, True where a sparse part takes over and nothing is rounded.
        precision: "float64" computes in float64, the others in float32; "tf32" lets CUDA multiply in TF32.
        block: columns of a block.
    """
    dtype = torch.float64 if precision == "float64" else torch.float32
    width = target.shape[1]
    gram = gram.to(dtype)
    diagonal = gram.diagonal()
    dead = diagonal <= DEAD * diagonal.mean()
    if group_index is None:
        group_index = torch.arange(width, device=target.device) // (width // scale.shape[1])
    return Problem(
        target=target.to(dtype).t().contiguous(),
        gram=gram,
        scale=scale.to(dtype).t().contiguous(),
        zero_point=zero_point.to(dtype).t().contiguous(),
        group_index=group_index,
        levels=2**bits - 1,
        inverse=torch.where(dead, 0.0, 1.0 / torch.where(dead, 1.0, diagonal)),
        dead=frozenset(dead.nonzero().flatten().tolist()),
        triangles=_triangles(gram, dead, min(block, width)),
        mask=None if mask is None else mask.t().contiguous(),
        precision=precision,
    )


def _triangles(gram: Tensor, dead: Tensor, block: int) -> Tensor:
    """Inverses of the lower triangles of the diagonal blocks, ``[ceil(i / B), B, B]``, computed in float64."""
    width = gram.shape[0]
    eye = torch.eye(block, dtype=torch.float64, device=gram.device)
    triangles = eye.repeat(-(-width // block), 1, 1)
    live = (~dead).double()
    for number, start in enumerate(range(0, width, block)):
        here = slice(start, min(start + block, width))
        size = here.stop - start
        lower = gram[here, here].double().tril() * live[here, None] * live[here] + dead[here].double().diag()
        inverse = torch.linalg.solve_triangular(lower, eye[:size, :size], upper=False)
        triangles[number, :size, :size] = inverse * live[here, None] * live[here]
    return triangles.to(gram.dtype)


def sweep(
    target: Tensor,
    gram: Tensor,
    values: Tensor,
    scale: Tensor,
    zero_point: Tensor,
    bits: int,
    *,
    rounded: bool = True,
    group_index: Tensor | None = None,
    mask: Tensor | None = None,
    precision: Precision = "float32",
) -> Sweep:
    """One sweep over all columns.

    Args:
        values: quantized or relaxed weights to start from, ``[o, i]``; W itself for the published start.
        rounded: False for a relaxed sweep.
        others: see ``prepare``.
    """
    problem = prepare(
        target, gram, scale, zero_point, bits, group_index=group_index, mask=mask, precision=precision
    )
    residual = problem.target - values.to(problem.target.dtype).t()
    changed, gain = sweep_(problem, residual, rounded)
    codes = codes_of(problem, residual)
    return Sweep(to_values_(problem, residual, rounded).t(), codes.t(), changed, gain)


def sweep_(problem: Problem, residual: Tensor, rounded: bool, backend: Backend = "auto") -> tuple[Tensor, Tensor]:
    """One sweep in place.

    Args:
        residual: ``W - W^``, contiguous ``[i, o]``, overwritten; dead columns become 0 and stay so.
        rounded: False for a relaxed sweep.
        backend: what rounds the columns of a block; by default Triton on CUDA where it is installed.

    Returns:
        ``changed`` and ``gain`` as in ``Sweep``; both stay on the device.
    """
    outputs = residual.shape[1]
    changed = torch.zeros((), dtype=torch.int64, device=residual.device)
    gain = torch.zeros(outputs, dtype=torch.float64, device=residual.device)
    if problem.dead:
        residual.mul_((problem.inverse > 0).to(residual.dtype)[:, None])
    work = residual.new_empty(problem.block, outputs)
    use_triton = backend == "triton" or (backend == "auto" and residual.is_cuda and has_triton())
    with matmul_precision(problem.precision):
        for number, columns in enumerate(problem.blocks()):
            gradient = torch.mm(problem.gram[columns], residual, out=work[: columns.stop - columns.start])
            if not rounded:
                _relax_block(problem, residual, gradient, number, columns, gain)
            elif use_triton:
                from omniq.kernels.coordinate_descent_triton import round_block

                round_block(problem, residual, gradient, columns, changed, gain)
            else:
                round_block_torch(problem, residual, gradient, columns, changed, gain)
    return changed, gain


def _relax_block(
    problem: Problem, residual: Tensor, gradient: Tensor, number: int, columns: slice, gain: Tensor
) -> None:
    size = columns.stop - columns.start
    steps = torch.mm(problem.triangles[number, :size, :size], gradient)  # -E, ``[B, o]``
    residual[columns] -= steps
    gain -= torch.mv(steps.square_().t(), problem.gram.diagonal()[columns])  # exact minimisers: -S_jj e_j^2


def round_block_torch(
    problem: Problem, residual: Tensor, gradient: Tensor, columns: slice, changed: Tensor, gain: Tensor
) -> None:
    """Step 2 of a rounded sweep: the columns of one block, in order.

    Args:
        residual: ``[i, o]``; the rows ``columns`` are overwritten.
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
    # Rows as lists: taking them apart once is cheaper than indexing in the loop.
    rows = zip(old.unbind(), best.unbind(), new.unbind(), scale.unbind(), zero_point.unbind(), strict=True)
    for t, (was, u, v, s, z) in enumerate(rows):
        if columns.start + t in problem.dead:
            u.copy_(was)
            v.copy_(was)  # no move and no step, so the residual stays 0
        else:
            g = torch.addmv(gradient[t], gradient[:t].t(), gram[t, :t]) if t else gradient[t]
            torch.addcmul(was, g, inverse[t], out=u)
            torch.div(u, s, out=v).round_().add_(z).clamp_(0, problem.levels).sub_(z).mul_(s)
            if mask is not None:
                torch.where(mask[t], u, v, out=v)
        torch.sub(was, v, out=gradient[t])
    torch.sub(target, new, out=residual)
    moved = gradient.abs() > 0.5 * scale
    changed += (moved if mask is None else moved & ~mask).sum()
    # S_jj ((v - u)^2 - (old - u)^2) with e = old - v, as one product that does not cancel
    difference = gradient * (2 * best - new - old)
    gain += torch.mv(difference.t(), gram.diagonal())


def codes_of(problem: Problem, residual: Tensor) -> Tensor:
    """Nearest codes of ``W - D``, uint8 ``[i, o]``: the codes themselves after a rounded sweep."""
    codes = torch.empty(residual.shape, dtype=torch.uint8, device=residual.device)
    for columns in problem.blocks():
        group = problem.group_index[columns]
        steps = ((problem.target[columns] - residual[columns]) / problem.scale[group]).round_()
        codes[columns] = steps.add_(problem.zero_point[group]).clamp_(0, problem.levels).to(torch.uint8)
    return codes


def to_values_(problem: Problem, residual: Tensor, rounded: bool) -> Tensor:
    """Overwrite the residual with ``W^``, ``[i, o]``: exactly on the grid wherever it was rounded."""
    for columns in problem.blocks():
        group = problem.group_index[columns]
        s, z = problem.scale[group], problem.zero_point[group]
        free = problem.target[columns] - residual[columns]
        grid = ((free / s).round_().add_(z).clamp_(0, problem.levels) - z) * s
        relaxed = (problem.inverse[columns] > 0)[:, None] if not rounded else torch.zeros_like(free, dtype=torch.bool)
        if problem.mask is not None:
            relaxed = relaxed | problem.mask[columns]
        residual[columns] = torch.where(relaxed, free, grid)
    return residual


def objective(problem: Problem, residual: Tensor) -> Tensor:
    """Each row's error ``d S d^T``, float64 ``[o]``, by one product."""
    total = torch.zeros(residual.shape[1], dtype=torch.float64, device=residual.device)
    with matmul_precision(problem.precision):
        for columns in problem.blocks():
            total += (torch.mm(problem.gram[columns], residual) * residual[columns]).sum(0)
    return total


def has_triton() -> bool:
    """Whether Triton can be imported."""
    return find_spec("triton") is not None


@contextmanager
def matmul_precision(precision: Precision) -> Iterator[None]:
    """Multiply float32 on CUDA in TF32, or make sure that it is not; restored afterwards."""
    backend = torch.backends.cuda.matmul
    name, value = ("fp32_precision", {True: "tf32", False: "ieee"}) if hasattr(backend, "fp32_precision") else (
        "allow_tf32", {True: True, False: False}
    )  # fp32_precision came with torch 2.9, which refuses a mixture of both names
    before = getattr(backend, name)
    setattr(backend, name, value[precision == "tf32"])
    try:
        yield
    finally:
        setattr(backend, name, before)
