# SPDX-License-Identifier: Apache-2.0
"""The sequential part of a coordinate descent sweep, one Triton kernel per block of columns.

The same step 2 as ``omniq.kernels.coordinate_descent.round_block``, fused: one program owns 32 rows of the layer for
all columns of a block, and rows are independent, so programs never meet. A block is walked in sub-blocks of 32 columns:

1. ``tl.dot`` brings the steps of all earlier sub-blocks to this one's gradients (they lie in the same buffer, because a
   step overwrites its gradient), and ``W^ + G / S_jj``, the value before rounding as far as it is known, replaces them;
2. inside the sub-block the columns go one by one. The steps taken so far are a tile ``[32 columns, 32 rows]`` in
   registers, one row of the layer per lane, so that ``sum_k S_jk e_k`` never leaves a lane. The sum for the next column
   is formed while this one is divided and rounded; only its last term has to wait. What the next column reads is
   loaded one column ahead.

Division is IEEE, and rounding is half to even by adding and subtracting ``1.5 * 2^23`` (``2^52`` in float64) after a
clamp to +-512, beyond which every code is clipped anyway: only the order of sums differs from the torch version. The
products of part 1 run on tensor cores: in TF32, or as three TF32 products that together keep the precision of float32;
in float64 they are sums of outer products, because not every release of Triton has a float64 dot.

Import this module only where Triton exists; ``omniq.kernels.coordinate_descent`` decides.

Shapes: ``o`` output features, ``i`` input features, ``B`` columns of a block.
"""
# mypy: allow-untyped-defs
# Triton reads types out of annotations: kernels have none but constexpr.

import torch
import triton
import triton.language as tl
from torch import Tensor

from omniq.kernels.layer_problem import Problem

_INNER = 32  # columns of a sub-block: 32 steps a lane stay in registers
_ROWS = 32  # rows of a program, one for each lane of its only warp: sums over columns stay inside a lane


@triton.jit
def _earlier_steps(
    work_ptr, gram_ptr, tile, low, column, inside, row, there, outputs, stride,
    INNER: tl.constexpr, PRODUCT: tl.constexpr,
):  # fmt: skip
    """Add ``S[low:low+n, :low] @ E[:low]`` to the gradients of a sub-block, ``[INNER, ROWS]``."""
    if PRODUCT == "outer":
        for k in range(0, low):
            weight = tl.load(gram_ptr + k * stride + column, mask=inside, other=0.0)  # symmetric: a row for a column
            step = tl.load(work_ptr + k * outputs + row, mask=there, other=0.0)
            tile += weight[:, None] * step[None, :]
    else:
        for start in range(0, low, INNER):
            k = start + tl.arange(0, INNER)
            weight = tl.load(gram_ptr + column[:, None] * stride + k[None, :], mask=inside[:, None], other=0.0)
            step = tl.load(work_ptr + k[:, None] * outputs + row[None, :], mask=there[None, :], other=0.0)
            tile = tl.dot(weight, step, tile, input_precision=PRODUCT)
    return tile


@triton.jit
def _nearest(u, scale, zero, LEVELS: tl.constexpr, MAGIC: tl.constexpr):
    """``clamp(round(u / s) + z, 0, L)``."""
    steps = u / scale if u.dtype == tl.float64 else tl.div_rn(u, scale)  # the former is IEEE in float64 only
    steps = tl.minimum(tl.maximum(steps, -512.0), 512.0)
    return tl.minimum(tl.maximum(((steps + MAGIC) - MAGIC) + zero, 0.0), LEVELS)


@triton.jit
def _load_column(
    work_ptr, target_ptr, residual_ptr, scale_ptr, zero_ptr, group_ptr, inverse_ptr, mask_ptr,
    c, row, there, outputs, MASKED: tl.constexpr,
):  # fmt: skip
    """What column ``c`` has of its own: u so far, target, residual, scale, zero point, mask ``[ROWS]``; 1 / S_cc."""
    at = c * outputs + row
    u = tl.load(work_ptr + at, mask=there, other=0.0)
    target = tl.load(target_ptr + at, mask=there, other=0.0)
    residual = tl.load(residual_ptr + at, mask=there, other=0.0)
    grid = tl.load(group_ptr + c) * outputs + row
    scale = tl.load(scale_ptr + grid, mask=there, other=1.0)
    zero = tl.load(zero_ptr + grid, mask=there, other=0.0)
    keep = tl.load(mask_ptr + at, mask=there, other=0) != 0 if MASKED else row < 0
    inverse = tl.load(inverse_ptr + c)
    return u, target, residual, scale, zero, keep, inverse


@triton.jit
def _round_block(
    work_ptr, gram_ptr, target_ptr, residual_ptr, scale_ptr, zero_ptr, group_ptr, inverse_ptr, mask_ptr,
    changed_ptr, gain_ptr, outputs, columns, stride,
    LEVELS: tl.constexpr, MASKED: tl.constexpr, MAGIC: tl.constexpr, PRODUCT: tl.constexpr,
    INNER: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    dtype = work_ptr.dtype.element_ty
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    there = row < outputs
    total = tl.zeros([ROWS], dtype=tl.float64)
    count = tl.zeros([ROWS], dtype=tl.int32)
    for low in range(0, columns, INNER):
        column = low + tl.arange(0, INNER)
        inside = column < columns
        at = column[:, None] * outputs + row[None, :]
        here = inside[:, None] & there[None, :]
        tile = tl.load(work_ptr + at, mask=here, other=0.0)
        tile = _earlier_steps(
            work_ptr, gram_ptr, tile, low, column, inside, row, there, outputs, stride, INNER, PRODUCT
        )
        was = tl.load(target_ptr + at, mask=here, other=0.0) - tl.load(residual_ptr + at, mask=here, other=0.0)
        inverses = tl.load(inverse_ptr + column, mask=inside, other=0.0)
        tl.store(work_ptr + at, was + tile * inverses[:, None], mask=here)
        tl.debug_barrier()  # lanes read below what other lanes have written
        steps = tl.zeros([INNER, ROWS], dtype=dtype)
        later = tl.zeros([ROWS], dtype=dtype)  # sum_k S_jk e_k over the steps of this sub-block
        gain = tl.zeros([ROWS], dtype=dtype)
        u, target, residual, scale, zero, keep, inverse = _load_column(
            work_ptr, target_ptr, residual_ptr, scale_ptr, zero_ptr, group_ptr, inverse_ptr, mask_ptr,
            low, row, there, outputs, MASKED,
        )  # fmt: skip
        for c in range(low, tl.minimum(low + INNER, columns)):
            follower = tl.minimum(c + 1, columns - 1)  # after the last column itself again, unused
            ahead = _load_column(
                work_ptr, target_ptr, residual_ptr, scale_ptr, zero_ptr, group_ptr, inverse_ptr, mask_ptr,
                follower, row, there, outputs, MASKED,
            )  # fmt: skip
            weight = tl.load(gram_ptr + follower * stride + column, mask=inside, other=0.0)
            link = tl.load(gram_ptr + follower * stride + c)
            diagonal = tl.load(gram_ptr + c * stride + c)
            partial = tl.sum(weight[:, None] * steps, axis=0)  # all but the step that is being found now
            old = target - residual
            u += later * inverse
            code = _nearest(u, scale, zero, LEVELS, MAGIC)
            new = (code - zero) * scale
            if MASKED:
                new = tl.where(keep, u, new)
            live = inverse > 0
            step = tl.where(live, old - new, 0.0)
            tl.store(work_ptr + c * outputs + row, step, mask=there)
            tl.store(residual_ptr + c * outputs + row, tl.where(live, target - new, 0.0), mask=there)
            gain += diagonal * step * (2.0 * u - new - old)
            count += ((tl.abs(step) > 0.5 * scale) & ~keep & there).to(tl.int32)
            steps = tl.where(column[:, None] == c, step[None, :], steps)
            later = partial + link * step
            u, target, residual, scale, zero, keep, inverse = ahead
        total += gain.to(tl.float64)
        tl.debug_barrier()
    tl.store(gain_ptr + row, tl.load(gain_ptr + row, mask=there, other=0.0) + total, mask=there)
    tl.atomic_add(changed_ptr, tl.sum(count, axis=0).to(tl.int64))


@triton.jit
def _keep_codes(
    target_ptr, residual_ptr, scale_ptr, zero_ptr, group_ptr, rows_ptr, codes_ptr, outputs,
    LEVELS: tl.constexpr, MAGIC: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    column = tl.program_id(1)
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    there = row < outputs
    chosen = there & (tl.load(rows_ptr + row, mask=there, other=0) != 0)
    at = column.to(tl.int64) * outputs + row
    grid = tl.load(group_ptr + column) * outputs + row
    u = tl.load(target_ptr + at, mask=chosen, other=0.0) - tl.load(residual_ptr + at, mask=chosen, other=0.0)
    scale = tl.load(scale_ptr + grid, mask=chosen, other=1.0)
    zero = tl.load(zero_ptr + grid, mask=chosen, other=0.0)
    tl.store(codes_ptr + at, _nearest(u, scale, zero, LEVELS, MAGIC).to(tl.uint8), mask=chosen)


def keep_codes_(problem: Problem, residual: Tensor, rows: Tensor, codes: Tensor) -> None:
    """See ``omniq.kernels.coordinate_descent.keep_codes_``."""
    inputs, outputs = residual.shape
    _keep_codes[(triton.cdiv(outputs, 1024), inputs)](
        problem.target, residual, problem.scale, problem.zero_point, problem.group_index, rows, codes, outputs,
        LEVELS=problem.levels, MAGIC=_magic(residual), ROWS=1024, num_warps=4,
    )  # fmt: skip


def _magic(tensor: Tensor) -> float:
    """Adding and subtracting it leaves no fraction."""
    return 1.5 * 2.0 ** (52 if tensor.dtype == torch.float64 else 23)


def round_block(
    problem: Problem, residual: Tensor, gradient: Tensor, columns: slice, changed: Tensor, gain: Tensor
) -> None:
    """See ``omniq.kernels.coordinate_descent.round_block``."""
    outputs = residual.shape[1]
    mask = problem.inverse if problem.mask is None else problem.mask[columns]  # the former is a pointer never read
    double = residual.dtype == torch.float64
    _round_block[(triton.cdiv(outputs, _ROWS),)](
        gradient, problem.gram[columns, columns], problem.target[columns], residual[columns],
        problem.scale, problem.zero_point, problem.group_index[columns], problem.inverse[columns], mask,
        changed, gain, outputs, columns.stop - columns.start, problem.gram.stride(0),
        LEVELS=problem.levels, MASKED=problem.mask is not None, MAGIC=_magic(residual),
        PRODUCT="outer" if double else "tf32" if problem.precision == "tf32" else "tf32x3",
        INNER=_INNER, ROWS=_ROWS, num_warps=1,
    )  # fmt: skip
