# SPDX-License-Identifier: Apache-2.0
"""The fused fake quantization of ``omniq.kernels.fake_quant_moving`` in Triton: the frozen weight is all that is read.

A program holds one whole row of the weight in registers, as a tile ``[GROUPS, SIZE]`` padded to powers of two, and goes
over the rows in strides of the number of programs. The next row is on its way while this one is computed.

    forward    w' = w c r;  range of each group -> s, z;  store (clamp(round(w' / s), -z, L - z)) s and the range
    backward   w' again; g_s and what follows from it, then d w' with the extremes, which adds d w' w' to the program's
               own sum for the columns; the sums of all programs are added afterwards, in a fixed order

So a half-precision weight costs 4 bytes forward and 4 backward, the floor, and results are deterministic on one kind of
GPU (the number of programs follows from its multiprocessors). The rest is as in ``omniq.kernels.fake_quant_triton``.

Import this module only where Triton exists; ``omniq.kernels.fake_quant_moving`` decides.

Shapes: ``o`` output features, ``i`` input features, ``G`` groups in a row, ``g`` group size, ``p`` programs.
"""
# mypy: allow-untyped-defs
# Triton reads types out of annotations: kernels have none but constexpr.

import torch
import triton
import triton.language as tl
from torch import Tensor

from omniq.kernels.fake_quant_moving_torch import room_for_gradients, room_for_range
from omniq.kernels.fake_quant_triton import TINY, between, floored, learned_grid, nearest, quotient, rounded_to, share

_WIDEST = 32768  # weights of a padded row: 32 in each of 1024 threads
_A_THREAD = 16  # weights of a row in each thread, if the threads suffice: two loads of 16 bytes in half precision
_FORWARD, _BACKWARD = 32, 16  # warps at a time on a multiprocessor: 64 and 128 registers a thread, which suffice


@triton.jit
def _add(a0, a1, a2, a3, b0, b1, b2, b3):
    return a0 + b0, a1 + b1, a2 + b2, a3 + b3


@triton.jit
def moving_forward(
    weight_ptr, rows_ptr, columns_ptr, upper_ptr, lower_ptr, out_ptr, lo_ptr, hi_ptr, outputs, width, groups, size,
    LEVELS: tl.constexpr, SYMMETRIC: tl.constexpr, BY_ROW: tl.constexpr, BY_COLUMN: tl.constexpr,
    GROUPS: tl.constexpr, SIZE: tl.constexpr,
):  # fmt: skip
    group, member = tl.arange(0, GROUPS), tl.arange(0, SIZE)
    there = group < groups
    place = group[:, None] * size + member[None, :]
    mask = there[:, None] & (member < size)[None, :]
    first, stride = tl.program_id(0), tl.num_programs(0)
    if BY_COLUMN:
        c = tl.load(columns_ptr + place, mask=mask, other=0.0).to(tl.float32)
    start, step = first.to(tl.int64) * width, stride.to(tl.int64) * width
    next_w = tl.load(weight_ptr + start + place, mask=mask, other=0.0)
    for row in range(first, outputs, stride):
        w = next_w.to(tl.float32)
        next_w = tl.load(weight_ptr + start + step + place, mask=mask & (row + stride < outputs), other=0.0)
        if BY_COLUMN:
            w *= c
        if BY_ROW:
            w *= tl.load(rows_ptr + row).to(tl.float32)
        lo, hi = tl.minimum(tl.min(w, axis=1), 0.0), tl.maximum(tl.max(w, axis=1), 0.0)
        which = row * groups + group
        tl.store(lo_ptr + which, lo, mask=there)
        tl.store(hi_ptr + which, hi, mask=there)
        _, _, _, _, scale, zero = learned_grid(lo, hi, upper_ptr, lower_ptr, which, there, LEVELS, SYMMETRIC)
        s, z = floored(scale)[:, None], zero[:, None]
        tl.store(out_ptr + start + place, rounded_to(w, s, z, LEVELS).to(out_ptr.dtype.element_ty), mask=mask)
        start += step


@triton.jit
def moving_backward(
    grad_ptr, weight_ptr, rows_ptr, columns_ptr, lo_ptr, hi_ptr, upper_ptr, lower_ptr,
    d_weight_ptr, d_rows_ptr, sums_ptr, d_upper_ptr, d_lower_ptr, outputs, width, groups, size,
    LEVELS: tl.constexpr, SYMMETRIC: tl.constexpr, BY_ROW: tl.constexpr, BY_COLUMN: tl.constexpr,
    TO_WEIGHT: tl.constexpr, GROUPS: tl.constexpr, SIZE: tl.constexpr,
):  # fmt: skip
    group, member = tl.arange(0, GROUPS), tl.arange(0, SIZE)
    there = group < groups
    place = group[:, None] * size + member[None, :]
    mask = there[:, None] & (member < size)[None, :]
    first, stride = tl.program_id(0), tl.num_programs(0)
    if BY_COLUMN:
        c = tl.load(columns_ptr + place, mask=mask, other=0.0).to(tl.float32)
        sums = tl.zeros([GROUPS, SIZE], tl.float32)
    start, step = first.to(tl.int64) * width, stride.to(tl.int64) * width
    next_w = tl.load(weight_ptr + start + place, mask=mask, other=0.0)
    next_g = tl.load(grad_ptr + start + place, mask=mask, other=0.0)
    for row in range(first, outputs, stride):
        w, g = next_w.to(tl.float32), next_g.to(tl.float32)
        next_w = tl.load(weight_ptr + start + step + place, mask=mask & (row + stride < outputs), other=0.0)
        next_g = tl.load(grad_ptr + start + step + place, mask=mask & (row + stride < outputs), other=0.0)
        if BY_COLUMN:
            w *= c
        if BY_ROW:
            r = tl.load(rows_ptr + row).to(tl.float32)
            w *= r

        which = row * groups + group
        lo = tl.load(lo_ptr + which, mask=there, other=0.0)
        hi = tl.load(hi_ptr + which, mask=there, other=0.0)
        keep_lo, keep_hi, xmin, xmax, scale, zero = learned_grid(
            lo, hi, upper_ptr, lower_ptr, which, there, LEVELS, SYMMETRIC
        )
        s, z = floored(scale)[:, None], zero[:, None]
        steps = quotient(w, s, tl.div_rn(1.0, s))
        rounded = nearest(steps)
        codes = between(rounded, -z, LEVELS - z)
        inside = rounded == codes
        at_lo, at_hi = tl.where(w == lo[:, None], 1.0, 0.0), tl.where(w == hi[:, None], 1.0, 0.0)
        if TO_WEIGHT:  # the padding must not share an extreme of zero; without ``d w`` that is multiplied by zero
            at_lo, at_hi = tl.where(mask, at_lo, 0.0), tl.where(mask, at_hi, 0.0)
        held, kept = g * (codes - tl.where(inside, steps, 0.0)), tl.where(inside, g, 0.0)
        residual, carried, n_lo, n_hi = tl.reduce((held, g * codes, at_lo, at_hi), 1, _add)

        d_range = tl.where(scale < TINY, 0.0, tl.div_rn(residual, LEVELS * 1.0))
        d_min, d_max = share(d_range, xmin, xmax, SYMMETRIC)
        tl.store(d_upper_ptr + which, (d_max * xmax * (1.0 - keep_hi)).to(d_upper_ptr.dtype.element_ty), mask=there)
        tl.store(d_lower_ptr + which, (d_min * xmin * (1.0 - keep_lo)).to(d_lower_ptr.dtype.element_ty), mask=there)
        if BY_ROW:
            d_r = tl.div_rn(tl.sum(carried * floored(scale), axis=0), r)
            tl.store(d_rows_ptr + row, d_r.to(d_rows_ptr.dtype.element_ty))
        if BY_COLUMN or TO_WEIGHT:
            to_lo = (d_min * keep_lo / tl.maximum(n_lo, 1.0))[:, None]
            to_hi = (d_max * keep_hi / tl.maximum(n_hi, 1.0))[:, None]
            d_w = kept + at_lo * to_lo + at_hi * to_hi
            if BY_COLUMN:
                sums += d_w * w
            if TO_WEIGHT:
                if BY_COLUMN:
                    d_w *= c
                if BY_ROW:
                    d_w *= r
                tl.store(d_weight_ptr + start + place, d_w.to(d_weight_ptr.dtype.element_ty), mask=mask)
        start += step
    if BY_COLUMN:
        tl.store(sums_ptr + first.to(tl.int64) * width + place, sums, mask=mask)


def fits(weight: Tensor, upper: Tensor) -> bool:
    """Whether a row can be held in registers."""
    groups, size = _tile(weight, upper)
    return groups * size <= _WIDEST


def forward(
    weight: Tensor,
    rows: Tensor,
    columns: Tensor,
    upper: Tensor,
    lower: Tensor,
    bits: int,
    symmetric: bool,
    out_dtype: torch.dtype,
) -> tuple[Tensor, Tensor, Tensor]:
    """As ``omniq.kernels.fake_quant_moving_torch.forward``."""
    given = weight, rows, columns, upper, lower = tuple(
        each.contiguous() for each in (weight, rows, columns, upper, lower)
    )
    out = torch.empty_like(weight, dtype=out_dtype)
    made = (out, *room_for_range(weight, upper))
    programs, options = _plan(weight, upper, _FORWARD)
    with torch.cuda.device(weight.device):
        moving_forward[(programs,)](
            *given, *made, *weight.shape, upper.shape[-1], weight.shape[-1] // upper.shape[-1],
            LEVELS=2**bits - 1, SYMMETRIC=symmetric, BY_ROW=rows.numel() > 0, BY_COLUMN=columns.numel() > 0, **options,
        )  # fmt: skip
    return made


def backward(
    grad: Tensor,
    weight: Tensor,
    rows: Tensor,
    columns: Tensor,
    lo: Tensor,
    hi: Tensor,
    upper: Tensor,
    lower: Tensor,
    bits: int,
    symmetric: bool,
    to_weight: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """As ``omniq.kernels.fake_quant_moving_torch.backward``."""
    given = grad, weight, rows, columns, lo, hi, upper, lower = tuple(
        each.contiguous() for each in (grad, weight, rows, columns, lo, hi, upper, lower)
    )
    made = d_weight, d_rows, d_columns, d_upper, d_lower = room_for_gradients(
        weight, rows, columns, upper, lower, to_weight
    )
    programs, options = _plan(weight, upper, _BACKWARD)
    sums = lo.new_empty(programs, columns.numel())  # [p, i]
    with torch.cuda.device(weight.device):
        moving_backward[(programs,)](
            *given, d_weight, d_rows, sums, d_upper, d_lower, *weight.shape, upper.shape[-1],
            weight.shape[-1] // upper.shape[-1], LEVELS=2**bits - 1, SYMMETRIC=symmetric, BY_ROW=rows.numel() > 0,
            BY_COLUMN=columns.numel() > 0, TO_WEIGHT=to_weight, **options,
        )  # fmt: skip
    d_columns.copy_(sums.sum(0) / columns)
    return made


def _tile(weight: Tensor, upper: Tensor) -> tuple[int, int]:
    """Groups of a row and weights of a group, padded to powers of two."""
    groups = upper.shape[-1]
    return triton.next_power_of_2(groups), triton.next_power_of_2(weight.shape[-1] // groups)


def _plan(weight: Tensor, upper: Tensor, at_a_time: int) -> tuple[int, dict[str, int]]:
    """Programs, as many as run at a time, and what the kernel is compiled for.

    Left alone the compiler takes more registers (184 a thread in the backward), and half as many programs fit.
    """
    groups, size = _tile(weight, upper)
    warps = min(32, max(1, groups * size // (32 * _A_THREAD)))
    each = max(1, at_a_time // warps)
    options = {"GROUPS": groups, "SIZE": size, "num_warps": warps}
    if torch.version.hip is None:
        options["maxnreg"] = 2**16 // (32 * each * warps)  # a multiprocessor has 2^16
    multiprocessors = torch.cuda.get_device_properties(weight.device).multi_processor_count
    return min(weight.shape[0], each * multiprocessors), options
