# SPDX-License-Identifier: Apache-2.0
"""The fused implementation of ``omniq.kernels.fake_quant`` in Triton: the weight is read once, the result written once.

**A given range** (``group_forward``, ``group_backward``): the weight ``[o, i]`` is viewed as ``[groups, g]`` with one
learned range for each group. A program owns ``ROWS`` whole groups and walks along them ``COLUMNS`` weights at a time.
So a group size of 16 and a row of 28672 use the same kernels, widths that are not a power of two are masked, and the
sum over a group needs neither atomics nor a second pass.

    forward    load range and logits -> s, z;       for each tile: load w, store (clamp(round(w / s), -z, L - z)) s
    backward   load range and logits -> s, z again; for each tile: load w and dLoss/dw^, add to g_s; store the gradients

**The range of the scaled weight** (``row_forward``, ``row_backward``): a program holds one whole row of the weight in
registers, as a tile ``[GROUPS, SIZE]`` padded to powers of two, and visits the rows in strides of the number of
programs. It loads the next row while it computes the current one.

    forward    w = W c r;  range of each group -> s, z;  store (clamp(round(w / s), -z, L - z)) s and the range
    backward   w again; g_s and the gradients that follow from it, then d w with the extremes; d w w is added to the
               program's own sum for the columns; afterwards the sums of all programs are added, in a fixed order

Weights are moved in their own dtype: in half precision 4 bytes a weight forward and 4 backward, which is the minimum.
Registers hold float32, so codes equal those of torch except for last bits of sigmoid and quotient. NaN stays NaN, as in
torch, so that a guard on the loss sees it. Results are deterministic: with a given range always, with the weight's own
range on one kind of GPU (the number of programs follows from its multiprocessors).

Import this module only where Triton exists; ``omniq.kernels.fused`` chooses.

Shapes: ``o`` output features, ``i`` input features, ``G`` groups in a row, ``g`` group size, ``p`` programs.
"""
# mypy: allow-untyped-defs
# Triton reads types out of annotations, so kernels annotate constexpr arguments only.

import torch
import triton
import triton.language as tl
from torch import Tensor

from omniq.kernels.fake_quant_torch import Operands, empty_gradients, empty_like, empty_range
from omniq.kernels.fused import on_device
from omniq.kernels.triton_functions import (
    at_least_tiny,
    code_gradients,
    learned_grid,
    range_gradients,
    round_to_grid,
    store,
)

_TILE = 2048  # weights of a program at a time: each thread of 4 warps loads twice 16 bytes of half precision
_WARPS = 4
_WIDEST = 32768  # weights of a padded row in registers: 32 in each of 1024 threads
_PER_THREAD = 16  # weights of a row in each thread, if the threads suffice: two loads of 16 bytes in half precision
_FORWARD, _BACKWARD = 32, 16  # concurrent warps on a multiprocessor: 64 and 128 registers a thread, which suffice


@triton.jit
def group_forward(
    weight_ptr, lo_ptr, hi_ptr, upper_ptr, lower_ptr, out_ptr, groups, size,
    MAX_CODE: tl.constexpr, SYMMETRIC: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    valid = row < groups
    start_of_row = row.to(tl.int64)[:, None] * size
    lo = tl.load(lo_ptr + row, mask=valid, other=0.0).to(tl.float32)
    hi = tl.load(hi_ptr + row, mask=valid, other=0.0).to(tl.float32)
    _, _, _, _, scale, zero = learned_grid(lo, hi, upper_ptr, lower_ptr, row, valid, MAX_CODE, SYMMETRIC)
    s, z = at_least_tiny(scale)[:, None], zero[:, None]
    for start in range(0, size, COLUMNS):
        column = start + tl.arange(0, COLUMNS)[None, :]
        mask = valid[:, None] & (column < size)
        w = tl.load(weight_ptr + start_of_row + column, mask=mask, other=0.0).to(tl.float32)
        out = round_to_grid(w, s, z, MAX_CODE).to(out_ptr.dtype.element_ty)
        tl.store(out_ptr + start_of_row + column, out, mask=mask)


@triton.jit
def group_backward(
    grad_ptr, weight_ptr, lo_ptr, hi_ptr, upper_ptr, lower_ptr,
    d_weight_ptr, d_lo_ptr, d_hi_ptr, d_upper_ptr, d_lower_ptr, groups, size,
    MAX_CODE: tl.constexpr, SYMMETRIC: tl.constexpr, TO_WEIGHT: tl.constexpr, ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    valid = row < groups
    lo = tl.load(lo_ptr + row, mask=valid, other=0.0).to(tl.float32)
    hi = tl.load(hi_ptr + row, mask=valid, other=0.0).to(tl.float32)
    keep_lo, keep_hi, xmin, xmax, scale, zero = learned_grid(
        lo, hi, upper_ptr, lower_ptr, row, valid, MAX_CODE, SYMMETRIC
    )
    s, z = at_least_tiny(scale)[:, None], zero[:, None]
    inverse = tl.div_rn(1.0, s)
    start_of_row = row.to(tl.int64)[:, None] * size
    total = tl.zeros([ROWS, COLUMNS], tl.float32)
    for start in range(0, size, COLUMNS):
        column = start + tl.arange(0, COLUMNS)[None, :]
        mask = valid[:, None] & (column < size)
        w = tl.load(weight_ptr + start_of_row + column, mask=mask, other=0.0).to(tl.float32)
        g = tl.load(grad_ptr + start_of_row + column, mask=mask, other=0.0).to(tl.float32)
        _, to_scale, kept = code_gradients(g, w, s, z, inverse, MAX_CODE)
        total += to_scale
        if TO_WEIGHT:
            store(d_weight_ptr, start_of_row + column, kept, mask)
    d_min, d_max = range_gradients(tl.sum(total, axis=1), scale, xmin, xmax, MAX_CODE, SYMMETRIC)
    store(d_upper_ptr, row, d_max * xmax * (1.0 - keep_hi), valid)
    store(d_lower_ptr, row, d_min * xmin * (1.0 - keep_lo), valid)
    if TO_WEIGHT:
        store(d_hi_ptr, row, d_max * keep_hi, valid)
        store(d_lo_ptr, row, d_min * keep_lo, valid)


@triton.jit
def _row_layout(groups, size, GROUPS: tl.constexpr, SIZE: tl.constexpr):
    """Index of each group, whether it exists, and offsets and mask of the weights of a padded row."""
    group, member = tl.arange(0, GROUPS), tl.arange(0, SIZE)
    valid = group < groups
    return group, valid, group[:, None] * size + member[None, :], valid[:, None] & (member < size)[None, :]


@triton.jit
def _scaled(w, c, rows_ptr, row, BY_ROW: tl.constexpr, BY_COLUMN: tl.constexpr):
    """``W c r`` of one row, and ``r``."""
    r = 1.0
    if BY_COLUMN:
        w *= c
    if BY_ROW:
        r = tl.load(rows_ptr + row).to(tl.float32)
        w *= r
    return w, r


@triton.jit
def row_forward(
    weight_ptr, rows_ptr, columns_ptr, upper_ptr, lower_ptr, out_ptr, lo_ptr, hi_ptr, outputs, width, groups, size,
    MAX_CODE: tl.constexpr, SYMMETRIC: tl.constexpr, BY_ROW: tl.constexpr, BY_COLUMN: tl.constexpr,
    GROUPS: tl.constexpr, SIZE: tl.constexpr,
):  # fmt: skip
    group, valid, offsets, mask = _row_layout(groups, size, GROUPS, SIZE)
    first, stride = tl.program_id(0), tl.num_programs(0)
    c = tl.load(columns_ptr + offsets, mask=mask, other=0.0).to(tl.float32) if BY_COLUMN else 1.0
    start, step = first.to(tl.int64) * width, stride.to(tl.int64) * width
    next_w = tl.load(weight_ptr + start + offsets, mask=mask, other=0.0)
    for row in range(first, outputs, stride):
        w = next_w.to(tl.float32)
        next_w = tl.load(weight_ptr + start + step + offsets, mask=mask & (row + stride < outputs), other=0.0)
        w, _ = _scaled(w, c, rows_ptr, row, BY_ROW, BY_COLUMN)
        lo, hi = tl.minimum(tl.min(w, axis=1), 0.0), tl.maximum(tl.max(w, axis=1), 0.0)
        which = row * groups + group
        tl.store(lo_ptr + which, lo, mask=valid)
        tl.store(hi_ptr + which, hi, mask=valid)
        _, _, _, _, scale, zero = learned_grid(lo, hi, upper_ptr, lower_ptr, which, valid, MAX_CODE, SYMMETRIC)
        s, z = at_least_tiny(scale)[:, None], zero[:, None]
        store(out_ptr, start + offsets, round_to_grid(w, s, z, MAX_CODE), mask)
        start += step


@triton.jit
def _extremes(w, lo, hi, mask, TO_WEIGHT: tl.constexpr):
    """1 where a weight is the smallest or the largest of its group."""
    at_lo, at_hi = tl.where(w == lo[:, None], 1.0, 0.0), tl.where(w == hi[:, None], 1.0, 0.0)
    if TO_WEIGHT:  # the padding must not share an extreme of zero; without ``d w`` it is multiplied by zero
        at_lo, at_hi = tl.where(mask, at_lo, 0.0), tl.where(mask, at_hi, 0.0)
    return at_lo, at_hi


@triton.jit
def _add_shares(d_w, at_lo, at_hi, d_lo, d_hi, n_lo, n_hi):
    """Add to each extreme weight its share of the gradient of the extreme; equal weights share equally."""
    return d_w + at_lo * (d_lo / tl.maximum(n_lo, 1.0))[:, None] + at_hi * (d_hi / tl.maximum(n_hi, 1.0))[:, None]


@triton.jit
def _add(a0, a1, a2, a3, b0, b1, b2, b3):
    return a0 + b0, a1 + b1, a2 + b2, a3 + b3


@triton.jit
def row_backward(
    grad_ptr, weight_ptr, rows_ptr, columns_ptr, lo_ptr, hi_ptr, upper_ptr, lower_ptr,
    d_weight_ptr, d_rows_ptr, sums_ptr, d_upper_ptr, d_lower_ptr, outputs, width, groups, size,
    MAX_CODE: tl.constexpr, SYMMETRIC: tl.constexpr, BY_ROW: tl.constexpr, BY_COLUMN: tl.constexpr,
    TO_WEIGHT: tl.constexpr, GROUPS: tl.constexpr, SIZE: tl.constexpr,
):  # fmt: skip
    group, valid, offsets, mask = _row_layout(groups, size, GROUPS, SIZE)
    first, stride = tl.program_id(0), tl.num_programs(0)
    c = tl.load(columns_ptr + offsets, mask=mask, other=0.0).to(tl.float32) if BY_COLUMN else 1.0
    sums = tl.zeros([GROUPS, SIZE], tl.float32)
    start, step = first.to(tl.int64) * width, stride.to(tl.int64) * width
    next_w = tl.load(weight_ptr + start + offsets, mask=mask, other=0.0)
    next_g = tl.load(grad_ptr + start + offsets, mask=mask, other=0.0)
    for row in range(first, outputs, stride):
        w, g = next_w.to(tl.float32), next_g.to(tl.float32)
        next_w = tl.load(weight_ptr + start + step + offsets, mask=mask & (row + stride < outputs), other=0.0)
        next_g = tl.load(grad_ptr + start + step + offsets, mask=mask & (row + stride < outputs), other=0.0)
        w, r = _scaled(w, c, rows_ptr, row, BY_ROW, BY_COLUMN)
        which = row * groups + group
        lo, hi = tl.load(lo_ptr + which, mask=valid, other=0.0), tl.load(hi_ptr + which, mask=valid, other=0.0)
        keep_lo, keep_hi, xmin, xmax, scale, zero = learned_grid(
            lo, hi, upper_ptr, lower_ptr, which, valid, MAX_CODE, SYMMETRIC
        )
        s = at_least_tiny(scale)[:, None]
        codes, to_scale, kept = code_gradients(g, w, s, zero[:, None], tl.div_rn(1.0, s), MAX_CODE)
        at_lo, at_hi = _extremes(w, lo, hi, mask, TO_WEIGHT)
        d_scale, to_row, n_lo, n_hi = tl.reduce((to_scale, g * codes, at_lo, at_hi), 1, _add)
        d_min, d_max = range_gradients(d_scale, scale, xmin, xmax, MAX_CODE, SYMMETRIC)
        store(d_upper_ptr, which, d_max * xmax * (1.0 - keep_hi), valid)
        store(d_lower_ptr, which, d_min * xmin * (1.0 - keep_lo), valid)
        if BY_ROW:
            store(d_rows_ptr, row, tl.div_rn(tl.sum(to_row * at_least_tiny(scale), axis=0), r), None)
        d_w = _add_shares(kept, at_lo, at_hi, d_min * keep_lo, d_max * keep_hi, n_lo, n_hi)
        if BY_COLUMN:
            sums += d_w * w
        if TO_WEIGHT:
            store(d_weight_ptr, start + offsets, d_w * c * r, mask)
        start += step
    if BY_COLUMN:
        tl.store(sums_ptr + first.to(tl.int64) * width + offsets, sums, mask=mask)


def fits(x: Operands, own_range: bool) -> bool:
    """True unless the kernels must compute the range of a row that is too long for registers."""
    groups, size = _row_tile(x)
    return not own_range or groups * size <= _WIDEST


def forward(x: Operands, bits: int, symmetric: bool, out_dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """See ``omniq.kernels.fake_quant_torch.forward``."""
    x = Operands(*(each.contiguous() for each in x))
    made = empty_like(x.weight, out_dtype), *empty_range(x)
    with on_device(x.weight):
        if x.lo.numel():
            programs, options = _group_launch(x)
            group_forward[(programs,)](
                x.weight, *x[3:], made[0], x.upper.numel(), x.weight.numel() // x.upper.numel(),
                MAX_CODE=2**bits - 1, SYMMETRIC=symmetric, **options,
            )  # fmt: skip
        else:
            programs, options = _row_launch(x, _FORWARD)
            row_forward[(programs,)](
                *x[:3], x.upper, x.lower, *made, *_row_sizes(x), MAX_CODE=2**bits - 1, SYMMETRIC=symmetric, **options
            )
    return made


def backward(grad: Tensor, x: Operands, bits: int, symmetric: bool, own_range: bool, to_weight: bool) -> Operands:
    """See ``omniq.kernels.fake_quant_torch.backward``."""
    grad, x = grad.contiguous(), Operands(*(each.contiguous() for each in x))
    made = empty_gradients(x, own_range, to_weight)
    options = {"MAX_CODE": 2**bits - 1, "SYMMETRIC": symmetric, "TO_WEIGHT": to_weight}
    with on_device(x.weight):
        if not own_range:
            programs, more = _group_launch(x)
            group_backward[(programs,)](
                grad, x.weight, *x[3:], made.weight, *made[3:], x.upper.numel(), x.weight.numel() // x.upper.numel(),
                **options, **more,
            )  # fmt: skip
            return made
        programs, more = _row_launch(x, _BACKWARD)
        sums = x.lo.new_empty(programs, x.columns.numel())  # [p, i]
        row_backward[(programs,)](
            grad, *x, made.weight, made.rows, sums, made.upper, made.lower, *_row_sizes(x), **options, **more
        )
    made.columns.copy_(sums.sum(0) / x.columns)
    return made


def _group_launch(x: Operands) -> tuple[int, dict[str, int]]:
    """Programs, and groups and columns of a tile."""
    columns = min(triton.next_power_of_2(x.weight.numel() // x.upper.numel()), _TILE)
    rows = _TILE // columns
    return triton.cdiv(x.upper.numel(), rows), {"ROWS": rows, "COLUMNS": columns, "num_warps": _WARPS}


def _row_sizes(x: Operands) -> tuple[int, int, int, int]:
    """Outputs, inputs, groups of a row and weights of a group."""
    return *x.weight.shape, x.upper.shape[-1], x.weight.shape[-1] // x.upper.shape[-1]


def _row_tile(x: Operands) -> tuple[int, int]:
    """Groups of a row and weights of a group, padded to powers of two."""
    _, _, groups, size = _row_sizes(x)
    return triton.next_power_of_2(groups), triton.next_power_of_2(size)


def _row_launch(x: Operands, concurrent: int) -> tuple[int, dict[str, int]]:
    """Programs, as many as run at the same time, and compile-time settings.

    Without a limit on registers the compiler takes more (184 a thread in the backward), and half as many programs fit.
    """
    groups, size = _row_tile(x)
    warps = min(32, max(1, groups * size // (32 * _PER_THREAD)))
    each = max(1, concurrent // warps)
    options = {"GROUPS": groups, "SIZE": size, "num_warps": warps}
    options |= {"BY_ROW": x.rows.numel() > 0, "BY_COLUMN": x.columns.numel() > 0}
    if torch.version.hip is None:
        options["maxnreg"] = 2**16 // (32 * each * warps)  # a multiprocessor has 2^16
    multiprocessors = torch.cuda.get_device_properties(x.weight.device).multi_processor_count
    return min(x.weight.shape[0], each * multiprocessors), options
