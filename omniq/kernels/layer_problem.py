# SPDX-License-Identifier: Apache-2.0
"""One layer in the form that coordinate descent uses: constant tensors, and the residual ``D = W - W^`` that changes.

    f(W^) = ||W X - W^ X||^2 = tr(D S D^T),   S = X X^T

All matrices are stored transposed, ``[i, o]``, so that a column of the layer, the unit of the descent, is contiguous.

A column is dead if its S_jj is at most 1e-8 of the mean diagonal. (The published test is ``== 0``; division by an S_jj
just above zero makes weights explode.) A dead column is rounded to the nearest code, and its residual is held at 0 so
that it does not affect other columns.

Shapes: ``o`` output features, ``i`` input features, ``G`` groups, ``B`` columns of a block.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from omniq.errors import UserError
from omniq.kernels.matmul_precision import Precision, matmul_precision

DEAD = 1e-8  # fraction of the mean diagonal: below it, float32 sums of squares of half-precision inputs are noise
BLOCK = 256  # columns of a product: enough arithmetic per byte of D for TF32 on an H100 (its balance: 120 flop a byte)
_LONG_BLOCK = 512  # columns on a GPU that a product of 256 does not fill: up to this many output features
_LONG_BLOCK_OUTPUTS = 16384
RUN = 16  # columns that the fused sweep holds in registers: the minimum of a tensor core
SLICE = 32  # columns at a time in loops that only save memory
_SUM_TERMS = 2048  # terms of a float32 sum of squares: its error is a millionth


@dataclass(frozen=True)
class Problem:
    """The constants of all sweeps of a layer; build it with ``prepare``.

    Args:
        target: original weights, ``[i, o]``.
        gram: ``[i, i]``, symmetric.
        scale, zero_point: ``[G, o]``.
        group_index: group of each column, int64 ``[i]``.
        max_code: largest code.
        inverse: ``1 / S_jj``, 0 for dead columns, ``[i]``.
        dead: indices of dead columns.
        triangles: inverse of the lower triangle of each diagonal block, ``[ceil(i / B), B, B]``; zero for dead columns.
        mask: coordinates that are not rounded, bool ``[i, o]``, or None.
        one_grid: whether each run of 16 columns, counted from the start of its block, lies in one group.
        precision: precision of the products.
    """

    target: Tensor
    gram: Tensor
    scale: Tensor
    zero_point: Tensor
    group_index: Tensor
    max_code: int
    inverse: Tensor
    dead: frozenset[int]
    triangles: Tensor
    mask: Tensor | None
    one_grid: bool
    precision: Precision

    @property
    def block(self) -> int:
        """Columns of a block, ``B``."""
        return self.triangles.shape[-1]

    @property
    def codes_per_byte(self) -> int:
        """Codes in a byte: two up to 4 bit."""
        return 2 if self.max_code < 16 else 1

    def blocks(self, size: int | None = None) -> Iterator[slice]:
        """The columns of each block in turn, or ``size`` columns at a time."""
        width, size = self.target.shape[0], size or self.block
        for start in range(0, width, size):
            yield slice(start, min(start + size, width))


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
    block: int | None = None,
) -> Problem:
    """Build a ``Problem``; tensors that already have the right layout are not copied. ``mask`` is ``[o, i]``.

    Args:
        target: original weights, ``[o, i]``; no copy if it is the transpose of a contiguous tensor.
        gram: ``[i, i]``, symmetric and finite; scale, zero_point: ``[o, G]``.
        group_index: group of each column, int64 ``[i]``; by default equal runs of neighbours.
        precision: "float64" computes in float64, the others in float32; "tf32" lets CUDA multiply in TF32.
        block: columns of a block; by default the fastest measured (docs/results.md).
    """
    dtype = torch.float64 if precision == "float64" else torch.float32
    gram = gram.to(dtype)
    dead = dead_columns(gram)
    group_index = groups_of(target, scale) if group_index is None else group_index.to(target.device)
    fastest = _LONG_BLOCK if target.is_cuda and len(target) <= _LONG_BLOCK_OUTPUTS else BLOCK
    block = min(block or fastest, len(gram))
    return Problem(
        target=target.to(dtype).t().contiguous(),
        gram=gram,
        scale=scale.to(dtype).t().contiguous(),
        zero_point=zero_point.to(dtype).t().contiguous(),
        group_index=group_index,
        max_code=2**bits - 1,
        inverse=torch.where(dead, 0.0, 1.0 / torch.where(dead, 1.0, gram.diagonal())),
        dead=frozenset(dead.nonzero().flatten().tolist()),
        triangles=_triangles(gram, dead, block),
        mask=None if mask is None else mask.t().contiguous(),
        one_grid=_one_grid(group_index, block),
        precision=precision,
    )


def check_finite(gram: Tensor) -> None:
    """Refuse a Gram matrix with entries that are not finite.

    Raises:
        UserError: entries are infinite or NaN.
    """
    if all_finite(gram):
        return
    spoilt = torch.cat([(~torch.isfinite(part)).any(1) for part in gram.split(BLOCK)])
    bad = int((~torch.isfinite(gram.diagonal())).sum()) or int(spoilt.sum())  # one bad input spoils its whole row
    raise UserError(f"the Gram matrix is not finite for {bad} of {len(gram)} inputs: check the calibration samples")


def all_finite(tensor: Tensor) -> bool:
    """True if all entries are finite. One pass, without the copy that ``isfinite`` makes."""
    return bool(torch.linalg.vector_norm(tensor, torch.inf).isfinite())


def dead_columns(gram: Tensor) -> Tensor:
    """Mask of the columns whose input carries nothing, bool ``[i]``."""
    diagonal = gram.diagonal()
    return diagonal <= DEAD * diagonal.mean()


def groups_of(weight: Tensor, scale: Tensor) -> Tensor:
    """Group of each column where groups are equal runs of neighbours, int64 ``[i]``."""
    width = weight.shape[1]
    return torch.arange(width, device=weight.device) // (width // scale.shape[1])


def _one_grid(group_index: Tensor, block: int) -> bool:
    """True if the columns of each run of 16 share a group; a block starts a new run."""
    column = torch.arange(len(group_index), device=group_index.device)
    return bool((group_index == group_index[column - column % block % RUN]).all())


def _triangles(gram: Tensor, dead: Tensor, block: int) -> Tensor:
    """Inverses of the lower triangles of the diagonal blocks, ``[ceil(i / B), B, B]``, computed in float64."""
    starts = range(0, len(gram), block)
    lower = gram.new_zeros(len(starts), block, block, dtype=torch.float64)
    for number, start in enumerate(starts):
        here = gram[start : start + block, start : start + block]
        lower[number, : len(here), : len(here)] = here.tril()
    missing = len(starts) * block - len(gram)
    out = torch.cat([dead, dead.new_ones(missing)]).view(len(starts), block)  # dead or beyond the last column
    lower *= ~(out[:, :, None] | out[:, None, :])
    lower += torch.diag_embed(out.double())
    eye = torch.eye(block, dtype=torch.float64, device=gram.device)
    inverse = torch.linalg.solve_triangular(lower, eye.expand_as(lower), upper=False)
    return (inverse - torch.diag_embed(out.double())).to(gram.dtype)


def nearest(problem: Problem, residual: Tensor, columns: slice) -> Tensor:
    """Nearest codes of ``W - D`` for some columns, ``[n, o]``, in the dtype of the weights."""
    group = problem.group_index[columns]
    steps = ((problem.target[columns] - residual[columns]) / problem.scale[group]).round_()
    return steps.add_(problem.zero_point[group]).clamp_(0, problem.max_code)


def empty_codes(problem: Problem) -> Tensor:
    """Zero codes, packed: uint8 ``[i, o]``, or ``[ceil(i / 2), o]`` up to 4 bit, the even column in the low half."""
    width, outputs = problem.target.shape
    lines = -(-width // problem.codes_per_byte)
    return torch.zeros(lines, outputs, dtype=torch.uint8, device=problem.target.device)


def unpack_codes(problem: Problem, packed: Tensor) -> Tensor:
    """Codes as ``keep_codes_`` packs them, unpacked to uint8 ``[i, o]``."""
    if problem.codes_per_byte == 1:
        return packed
    codes = packed.new_empty(problem.target.shape)
    torch.bitwise_and(packed, 15, out=codes[::2])
    torch.bitwise_right_shift(packed[: len(codes) // 2], 4, out=codes[1::2])
    return codes


def to_values_(problem: Problem, residual: Tensor, rounded: bool) -> Tensor:
    """Overwrite the residual with ``W^``, ``[i, o]``: exactly on the grid wherever it was rounded."""
    for columns in problem.blocks(SLICE):
        group = problem.group_index[columns]
        free = problem.target[columns] - residual[columns]
        grid = (nearest(problem, residual, columns) - problem.zero_point[group]) * problem.scale[group]
        relaxed = torch.full_like(free, not rounded, dtype=torch.bool) & (problem.inverse[columns] > 0)[:, None]
        if problem.mask is not None:
            relaxed |= problem.mask[columns]
        residual[columns] = torch.where(relaxed, free, grid)
    return residual


def to_residual_(problem: Problem, values: Tensor) -> Tensor:
    """Overwrite ``W^`` with the residual, both ``[i, o]``; dead columns get 0."""
    values.neg_().add_(problem.target)
    if problem.dead:
        values.mul_((problem.inverse > 0).to(values.dtype)[:, None])
    return values


def squares(matrix: Tensor) -> Tensor:
    """Sum of squares of each row of the layer, float64 ``[o]``, of ``[i, o]``.

    NOTE: only the sums of parts are float64, because a reduction to another dtype first copies the whole tensor to it.
    """
    total = torch.zeros(matrix.shape[1], dtype=torch.float64, device=matrix.device)
    for part in matrix.split(_SUM_TERMS):
        total += torch.linalg.vector_norm(part, dim=0).double().square_()
    return total


def objective(problem: Problem, residual: Tensor) -> Tensor:
    """Each row's error ``d S d^T``, float64 ``[o]``, by one product."""
    total = torch.zeros(residual.shape[1], dtype=torch.float64, device=residual.device)
    with matmul_precision(problem.precision, residual.device):
        for columns in problem.blocks():
            total += torch.mm(problem.gram[columns], residual).mul_(residual[columns]).sum(0)
    return total
