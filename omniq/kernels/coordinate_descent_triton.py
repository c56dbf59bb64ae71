# SPDX-License-Identifier: Apache-2.0
"""The sequential part of a coordinate descent sweep, one Triton kernel for each block of columns.

It is step 2 of ``omniq.kernels.coordinate_descent``, fused. One program owns 32 rows of the layer for all columns of a
block. Rows are independent, so programs never communicate. A program visits a block in runs of 16 columns:

1. ``tl.dot`` applies the steps of all earlier runs to the gradients of this run. Both lie in the same buffer, because a
   step overwrites its gradient.
2. The data of the run is loaded at once: its columns of ``G``, ``W`` and ``D``, one row of the layer per lane, and its
   triangle of S. A barrier after these loads keeps the compiler from spreading them over the arithmetic, which would
   then wait for each of them.
3. The columns are visited one by one, unrolled, in registers alone: ``sum_k S_jk e_k`` never leaves a lane. The chain
   from one step to the next is a dozen dependent instructions; about seventy are issued for each column.

The quotient ``u / s`` is a product with ``1 / s`` and one correction by its exact remainder. It equals IEEE division
except for rare last bits, and has no branch. Rounding is half to even by adding and subtracting ``1.5 * 2^23``
(``2^52`` in float64), after a clamp to the range of codes. The bounds of that range are integers, so the order of
clamping and rounding does not matter. Therefore only the order of sums differs from the torch implementation. The
products of part 1 run on tensor cores: in TF32, or as three TF32 products that together keep the precision of float32.
In float64 they are sums of outer products, because not every release of Triton has a float64 dot.

Import this module only where Triton exists; ``omniq.kernels.fused`` chooses.

Shapes: ``o`` output features, ``i`` input features, ``B`` columns of a block.
"""
# mypy: allow-untyped-defs, disable-error-code="assignment,var-annotated"
# Triton reads types out of annotations, so kernels annotate constexpr arguments only. Tuples grow while a loop is
# unrolled.

import torch
import triton
import triton.language as tl
from torch import Tensor

from omniq.kernels.layer_problem import RUN, Problem

_ROWS = 32  # rows of a program, one for each lane of its only warp
_DEPTH = 64  # earlier columns of one tl.dot: enough bytes in flight for a warp that has an SM to itself


@triton.jit
def _earlier_steps(
    work_ptr, gram_ptr, low, columns, row, valid, outputs, stride,
    RUN: tl.constexpr, DEPTH: tl.constexpr, PRODUCT: tl.constexpr,
):  # fmt: skip
    """Add ``S[low:low+n, :low] @ E[:low]`` to the gradients of a run, in place."""
    column = low + tl.arange(0, RUN)
    inside = column < columns
    at = column[:, None] * outputs + row[None, :]
    here = inside[:, None] & valid[None, :]
    tile = tl.load(work_ptr + at, mask=here, other=0.0)
    if PRODUCT == "outer":
        for k in range(0, low):
            weight = tl.load(gram_ptr + k * stride + column, mask=inside, other=0.0)  # symmetric: a row for a column
            step = tl.load(work_ptr + k * outputs + row, mask=valid, other=0.0)
            tile += weight[:, None] * step[None, :]
    else:
        for start in range(0, low, DEPTH):
            k = start + tl.arange(0, DEPTH)
            known = k < low
            linked = inside[:, None] & known[None, :]
            weight = tl.load(gram_ptr + column[:, None] * stride + k[None, :], mask=linked, other=0.0)
            taken = known[:, None] & valid[None, :]
            step = tl.load(work_ptr + k[:, None] * outputs + row[None, :], mask=taken, other=0.0)
            tile = tl.dot(weight, step, tile, input_precision=PRODUCT)
    tl.store(work_ptr + at, tile, mask=here)
    tl.debug_barrier()  # lanes read below what other lanes have written


@triton.jit
def _nearest(u, scale, zero, max_code, MAGIC: tl.constexpr):
    """``clamp(round(u / s) + z, 0, L) - z``."""
    per_step = 1.0 / scale
    steps = u * per_step
    steps = tl.fma(tl.fma(-steps, scale, u), per_step, steps)
    steps = tl.minimum(tl.maximum(steps, -zero), max_code - zero)
    return (steps + MAGIC) - MAGIC


@triton.jit
def _load_run(
    work_ptr, gram_ptr, target_ptr, residual_ptr, inverse_ptr, mask_ptr, low, columns, row, valid, outputs, stride,
    MASKED: tl.constexpr, FULL_RUNS: tl.constexpr, RUN: tl.constexpr,
):  # fmt: skip
    """Part 2: gradients, targets, weights, unrounded coordinates, triangle of S and inverses of a run, as tuples."""
    gradients, targets, olds, keeps, weights, inverses = (), (), (), (), (), ()
    for t in tl.static_range(RUN):
        inside = (low + t < columns) | FULL_RUNS
        at = (low + t) * outputs + row
        gradients += (tl.load(work_ptr + at, mask=valid & inside, other=0.0),)
        target = tl.load(target_ptr + at, mask=valid & inside, other=0.0)
        targets += (target,)
        olds += (target - tl.load(residual_ptr + at, mask=valid & inside, other=0.0),)
        if MASKED:
            keeps += (tl.load(mask_ptr + at, mask=valid & inside, other=0) != 0,)
        for k in tl.static_range(t):
            weights += (tl.load(gram_ptr + (low + t) * stride + low + k, mask=inside, other=0.0),)
        inverses += (tl.load(inverse_ptr + low + t, mask=inside, other=0.0),)  # 0: no step
    return gradients, targets, olds, keeps, weights, inverses


@triton.jit
def _store_run(work_ptr, residual_ptr, steps, residuals, low, columns, row, valid, outputs,
               FULL_RUNS: tl.constexpr, RUN: tl.constexpr):  # fmt: skip
    for t in tl.static_range(RUN):
        here = valid & ((low + t < columns) | FULL_RUNS)
        at = (low + t) * outputs + row
        tl.store(work_ptr + at, steps[t], mask=here)
        tl.store(residual_ptr + at, residuals[t], mask=here)


@triton.jit
def _visit(old, gradient, inverse, keep, scale, zero, max_code, MASKED: tl.constexpr, MAGIC: tl.constexpr):
    """The exact minimizer of one coordinate, its new value, the step, and whether its code moved."""
    u = old + gradient * inverse
    new = _nearest(u, scale, zero, max_code, MAGIC) * scale
    if MASKED:
        new = tl.where(keep, u, new)
    step = tl.where(inverse > 0, old - new, 0.0)
    moved = tl.abs(step) > 0.5 * scale
    if MASKED:
        moved = moved & (keep == 0)
    return u, new, step, moved


@triton.jit
def _round_block(
    work_ptr, gram_ptr, target_ptr, residual_ptr, scale_ptr, zero_ptr, group_ptr, inverse_ptr, mask_ptr,
    changed_ptr, gain_ptr, outputs, columns, stride, max_code,
    MASKED: tl.constexpr, ONE_GRID: tl.constexpr, FULL_RUNS: tl.constexpr, MAGIC: tl.constexpr,
    PRODUCT: tl.constexpr, RUN: tl.constexpr, ROWS: tl.constexpr, DEPTH: tl.constexpr,
):  # fmt: skip
    """One block. ONE_GRID: the columns of a run share a group. FULL_RUNS: the last run is as long as the others."""
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    valid = row < outputs
    total = tl.zeros([ROWS], dtype=tl.float64)
    count = tl.zeros([ROWS], dtype=tl.int32)
    for low in range(0, columns, RUN):
        if low > 0:
            _earlier_steps(work_ptr, gram_ptr, low, columns, row, valid, outputs, stride, RUN, DEPTH, PRODUCT)
        gradients, targets, olds, keeps, weights, inverses = _load_run(
            work_ptr, gram_ptr, target_ptr, residual_ptr, inverse_ptr, mask_ptr, low, columns, row, valid, outputs,
            stride, MASKED, FULL_RUNS, RUN,
        )  # fmt: skip
        grid = tl.load(group_ptr + low) * outputs + row
        tl.debug_barrier()
        # NOTE: these two come after the barrier so that the arithmetic, which needs them, does so as well.
        scale = tl.load(scale_ptr + grid, mask=valid, other=1.0)
        zero = tl.load(zero_ptr + grid, mask=valid, other=0.0)
        gain = tl.zeros([ROWS], dtype=work_ptr.dtype.element_ty)
        steps, residuals = (), ()
        for t in tl.static_range(RUN):
            inside = (low + t < columns) | FULL_RUNS
            if not ONE_GRID:
                grid = tl.load(group_ptr + low + t, mask=inside, other=0) * outputs + row
                scale = tl.load(scale_ptr + grid, mask=valid, other=1.0)
                zero = tl.load(zero_ptr + grid, mask=valid, other=0.0)
            gradient = gradients[t]
            for k in tl.static_range(t):
                gradient += weights[t * (t - 1) // 2 + k] * steps[k]
            keep = keeps[t] if MASKED else False
            u, new, step, moved = _visit(olds[t], gradient, inverses[t], keep, scale, zero, max_code, MASKED, MAGIC)
            count += moved.to(tl.int32)
            diagonal = tl.load(gram_ptr + (low + t) * (stride + 1), mask=inside, other=0.0)
            gain += diagonal * step * (2.0 * u - new - olds[t])
            steps += (step,)
            residuals += (tl.where(inverses[t] > 0, targets[t] - new, 0.0),)
        _store_run(work_ptr, residual_ptr, steps, residuals, low, columns, row, valid, outputs, FULL_RUNS, RUN)
        total += gain.to(tl.float64)
        tl.debug_barrier()
    tl.store(gain_ptr + row, tl.load(gain_ptr + row, mask=valid, other=0.0) + total, mask=valid)
    tl.atomic_add(changed_ptr, tl.sum(count, axis=0).to(tl.int64))


@triton.jit
def _take_steps(
    residual_ptr, steps_ptr, gram_ptr, gain_ptr, outputs, columns, stride, ROWS: tl.constexpr, COLUMNS: tl.constexpr
):  # fmt: skip
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    column = tl.arange(0, COLUMNS)
    valid, inside = row < outputs, column < columns
    at, here = column[:, None] * outputs + row[None, :], inside[:, None] & valid[None, :]
    step = tl.load(steps_ptr + at, mask=here, other=0.0)
    tl.store(residual_ptr + at, tl.load(residual_ptr + at, mask=here, other=0.0) - step, mask=here)
    diagonal = tl.load(gram_ptr + column * (stride + 1), mask=inside, other=0.0)
    gain = tl.sum(diagonal[:, None] * step * step, axis=0).to(tl.float64)  # to exact minimisers: -S_jj e_j^2
    tl.store(gain_ptr + row, tl.load(gain_ptr + row, mask=valid, other=0.0) - gain, mask=valid)


@triton.jit
def _keep_codes(
    target_ptr, residual_ptr, scale_ptr, zero_ptr, group_ptr, rows_ptr, codes_ptr, outputs, columns,
    max_code, MAGIC: tl.constexpr, ROWS: tl.constexpr, PER_BYTE: tl.constexpr,
):  # fmt: skip
    line = tl.program_id(1)
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    valid = row < outputs
    chosen = valid & (tl.load(rows_ptr + row, mask=valid, other=0) != 0)
    packed = tl.zeros([ROWS], dtype=tl.int32)
    for part in tl.static_range(PER_BYTE):
        column = line * PER_BYTE + part
        here = chosen & (column < columns)
        at = column.to(tl.int64) * outputs + row
        grid = tl.load(group_ptr + column, mask=column < columns, other=0) * outputs + row
        u = tl.load(target_ptr + at, mask=here, other=0.0) - tl.load(residual_ptr + at, mask=here, other=0.0)
        scale = tl.load(scale_ptr + grid, mask=here, other=1.0)
        zero = tl.load(zero_ptr + grid, mask=here, other=0.0)
        code = _nearest(u, scale, zero, max_code, MAGIC) + zero
        packed += code.to(tl.int32) << (4 * part)
    tl.store(codes_ptr + line.to(tl.int64) * outputs + row, packed.to(tl.uint8), mask=chosen)


def keep_codes_(problem: Problem, residual: Tensor, rows: Tensor, packed: Tensor) -> None:
    """See ``omniq.kernels.coordinate_descent_torch.keep_codes_``."""
    inputs, outputs = residual.shape
    rows = rows.contiguous()  # may be one expanded value
    _keep_codes[(triton.cdiv(outputs, 1024), len(packed))](
        problem.target, residual, problem.scale, problem.zero_point, problem.group_index, rows, packed, outputs, inputs,
        problem.max_code, MAGIC=_rounding_constant(residual), ROWS=1024, PER_BYTE=problem.codes_per_byte, num_warps=4,
    )  # fmt: skip


def take_steps(problem: Problem, residual: Tensor, steps: Tensor, columns: slice, gain: Tensor) -> None:
    """See ``omniq.kernels.coordinate_descent_torch.take_steps``."""
    outputs = residual.shape[1]
    _take_steps[(triton.cdiv(outputs, _ROWS),)](
        residual[columns], steps, problem.gram[columns, columns], gain, outputs, len(steps), problem.gram.stride(0),
        ROWS=_ROWS, COLUMNS=triton.next_power_of_2(len(steps)), num_warps=8,
    )  # fmt: skip


def _rounding_constant(tensor: Tensor) -> float:
    """The number that rounds to an integer when it is added and subtracted."""
    return 1.5 * 2.0 ** (52 if tensor.dtype == torch.float64 else 23)


def round_block(
    problem: Problem, residual: Tensor, gradient: Tensor, columns: slice, changed: Tensor, gain: Tensor
) -> None:
    """See ``omniq.kernels.coordinate_descent_torch.round_block``."""
    outputs, size = residual.shape[1], columns.stop - columns.start
    mask = (
        problem.inverse if problem.mask is None else problem.mask[columns]
    )  # without a mask any pointer will do: it is never read
    double = residual.dtype == torch.float64
    _round_block[(triton.cdiv(outputs, _ROWS),)](
        gradient, problem.gram[columns, columns], problem.target[columns], residual[columns],
        problem.scale, problem.zero_point, problem.group_index[columns], problem.inverse[columns], mask,
        changed, gain, outputs, size, problem.gram.stride(0), problem.max_code,
        MASKED=problem.mask is not None, ONE_GRID=problem.one_grid, FULL_RUNS=size % RUN == 0,
        MAGIC=_rounding_constant(residual),
        PRODUCT="outer" if double else "tf32" if problem.precision == "tf32" else "tf32x3",
        RUN=RUN, ROWS=_ROWS, DEPTH=_DEPTH, num_warps=1,
    )  # fmt: skip
