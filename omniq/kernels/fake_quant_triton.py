# SPDX-License-Identifier: Apache-2.0
"""The fused fake quantization of ``omniq.kernels.fake_quant`` in Triton: the weight read once, the result written once.

The weight ``[o, i]`` is taken as ``[groups, g]``, one learned range each. A program owns ``ROWS`` whole groups and
walks along them ``COLUMNS`` weights at a time, so a group size of 16 and a row of 28672 run in the same two kernels,
widths that are no power of two are masked, and the sum over a group needs neither atomics nor a second pass: results
are deterministic.

    forward    load range and logits -> s, z;       per tile: load w, store (clamp(round(w / s), -z, L - z)) s
    backward   load range and logits -> s, z again; per tile: load w and dLoss/dw^, accumulate g_s; store the gradients

A range that is the weight's own is found by one more walk before the forward's, and its gradient added to the extreme
weights by one more after the backward's; both walk over what the cache still holds.

Weights travel in their own dtype (half: 4 bytes a weight forward, 4 backward, which is the floor); everything in
registers is float32, so that codes equal those of the torch version up to last bits of sigmoid and quotient. Rounding
half to even adds and subtracts ``1.5 * 2^23``; the quotient is first clamped to +-512, beyond which every code is
clipped anyway (``z`` and ``L`` are at most 255).

Import this module only where Triton exists; ``omniq.kernels.fake_quant`` decides.

Shapes: ``o`` output features, ``i`` input features, ``G`` groups in a row, ``g`` group size.
"""
# mypy: allow-untyped-defs
# Triton reads types out of annotations: kernels have none but constexpr.

import torch
import triton
import triton.language as tl
from torch import Tensor

from omniq.kernels.fake_quant_torch import room_for_gradients, room_for_range

_TILE = 2048  # weights a program holds at a time: each thread of 4 warps loads twice 16 bytes of half precision
_WARPS = 4
_TINY = tl.constexpr(torch.finfo(torch.float32).tiny)  # the least scale
_MAGIC = tl.constexpr(1.5 * 2.0**23)  # a sum with it has no bits left for a fraction


@triton.jit
def _round(x):
    return (x + _MAGIC) - _MAGIC


@triton.jit
def _steps(w, s, inverse):
    """``w / s``, clamped. A correction by the remainder makes the product with ``1 / s`` an IEEE quotient, but for rare
    last bits, at a third of the instructions of a division."""
    guess = w * inverse
    quotient = tl.fma(tl.fma(-guess, s, w), inverse, guess)
    return tl.minimum(tl.maximum(quotient, -512.0), 512.0)


@triton.jit
def _learned_grid(lo, hi, upper_ptr, lower_ptr, row, there, LEVELS: tl.constexpr, SYMMETRIC: tl.constexpr):
    """Kept shares of lo and hi, clipped range, scale before its floor, and zero point of each group, ``[ROWS]``."""
    keep_lo = tl.sigmoid(tl.load(lower_ptr + row, mask=there, other=0.0).to(tl.float32))
    keep_hi = tl.sigmoid(tl.load(upper_ptr + row, mask=there, other=0.0).to(tl.float32))
    xmin, xmax = keep_lo * lo, keep_hi * hi
    if SYMMETRIC:
        scale = tl.div_rn(2.0 * tl.maximum(xmax, -xmin), LEVELS * 1.0)
        zero = tl.full(scale.shape, (LEVELS + 1) // 2, tl.float32)
    else:
        scale = tl.div_rn(xmax - xmin, LEVELS * 1.0)
        zero = tl.minimum(tl.maximum(_round(tl.div_rn(-xmin, tl.maximum(scale, _TINY))), 0.0), LEVELS)
    return keep_lo, keep_hi, xmin, xmax, scale, zero


@triton.jit
def _forward(
    weight_ptr, lo_ptr, hi_ptr, upper_ptr, lower_ptr, out_ptr, groups, size,
    LEVELS: tl.constexpr, SYMMETRIC: tl.constexpr, OWN_RANGE: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    there = row < groups
    start_of_row = row.to(tl.int64)[:, None] * size
    if OWN_RANGE:
        smallest, largest = tl.zeros([ROWS, COLUMNS], tl.float32), tl.zeros([ROWS, COLUMNS], tl.float32)
        for start in range(0, size, COLUMNS):
            column = start + tl.arange(0, COLUMNS)[None, :]
            mask = there[:, None] & (column < size)
            w = tl.load(weight_ptr + start_of_row + column, mask=mask, other=0.0).to(tl.float32)
            smallest, largest = tl.minimum(smallest, w), tl.maximum(largest, w)
        lo, hi = tl.min(smallest, axis=1), tl.max(largest, axis=1)
        tl.store(lo_ptr + row, lo, mask=there)
        tl.store(hi_ptr + row, hi, mask=there)
    else:
        lo = tl.load(lo_ptr + row, mask=there, other=0.0).to(tl.float32)
        hi = tl.load(hi_ptr + row, mask=there, other=0.0).to(tl.float32)
    _, _, _, _, scale, zero = _learned_grid(lo, hi, upper_ptr, lower_ptr, row, there, LEVELS, SYMMETRIC)
    s, z = tl.maximum(scale, _TINY)[:, None], zero[:, None]
    inverse = tl.div_rn(1.0, s)
    for start in range(0, size, COLUMNS):
        column = start + tl.arange(0, COLUMNS)[None, :]
        mask = there[:, None] & (column < size)
        w = tl.load(weight_ptr + start_of_row + column, mask=mask, other=0.0).to(tl.float32)
        codes = tl.minimum(tl.maximum(_round(_steps(w, s, inverse)), -z), LEVELS - z)
        tl.store(out_ptr + start_of_row + column, (codes * s).to(out_ptr.dtype.element_ty), mask=mask)


@triton.jit
def _add_at_extremes(
    grad_ptr, weight_ptr, d_weight_ptr, there, size, lo, hi, to_lo, to_hi, s, z, inverse, start_of_row,
    LEVELS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """Write the gradient of the weights equal to ``lo`` or ``hi`` once more, with their share of that of the range.

    They are few: this walk reads the weight, which is still in cache, and moves little else.
    """
    for start in range(0, size, COLUMNS):
        column = start + tl.arange(0, COLUMNS)[None, :]
        mask = there[:, None] & (column < size)
        w = tl.load(weight_ptr + start_of_row + column, mask=mask, other=0.0).to(tl.float32)
        extreme = mask & ((w == lo) | (w == hi))
        g = tl.load(grad_ptr + start_of_row + column, mask=extreme, other=0.0).to(tl.float32)
        rounded = _round(_steps(w, s, inverse))
        inside = rounded == tl.minimum(tl.maximum(rounded, -z), LEVELS - z)
        d_w = tl.where(inside, g, 0.0) + tl.where(w == lo, to_lo, 0.0) + tl.where(w == hi, to_hi, 0.0)
        tl.store(d_weight_ptr + start_of_row + column, d_w.to(d_weight_ptr.dtype.element_ty), mask=extreme)


@triton.jit
def _share(d_range, xmin, xmax, SYMMETRIC: tl.constexpr):
    """Gradients of xmin and xmax: opposite, or symmetric twice to the larger side, once to each in a tie."""
    if SYMMETRIC:
        d_min = -d_range * tl.where(-xmin > xmax, 2.0, tl.where(xmax == -xmin, 1.0, 0.0))
        d_max = d_range * tl.where(xmax > -xmin, 2.0, tl.where(xmax == -xmin, 1.0, 0.0))
    else:
        d_min, d_max = -d_range, d_range
    return d_min, d_max


@triton.jit
def _backward(
    grad_ptr, weight_ptr, lo_ptr, hi_ptr, upper_ptr, lower_ptr,
    d_weight_ptr, d_lo_ptr, d_hi_ptr, d_upper_ptr, d_lower_ptr, groups, size,
    LEVELS: tl.constexpr, SYMMETRIC: tl.constexpr, MOVING: tl.constexpr, OWN_RANGE: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    there = row < groups
    lo = tl.load(lo_ptr + row, mask=there, other=0.0).to(tl.float32)
    hi = tl.load(hi_ptr + row, mask=there, other=0.0).to(tl.float32)
    keep_lo, keep_hi, xmin, xmax, scale, zero = _learned_grid(
        lo, hi, upper_ptr, lower_ptr, row, there, LEVELS, SYMMETRIC
    )
    s, z = tl.maximum(scale, _TINY)[:, None], zero[:, None]
    inverse = tl.div_rn(1.0, s)
    start_of_row = row.to(tl.int64)[:, None] * size
    total = tl.zeros([ROWS, COLUMNS], tl.float32)
    at_lo, at_hi = tl.zeros([ROWS, COLUMNS], tl.float32), tl.zeros([ROWS, COLUMNS], tl.float32)
    for start in range(0, size, COLUMNS):
        column = start + tl.arange(0, COLUMNS)[None, :]
        mask = there[:, None] & (column < size)
        w = tl.load(weight_ptr + start_of_row + column, mask=mask, other=0.0).to(tl.float32)
        g = tl.load(grad_ptr + start_of_row + column, mask=mask, other=0.0).to(tl.float32)
        steps = _steps(w, s, inverse)
        rounded = _round(steps)
        codes = tl.minimum(tl.maximum(rounded, -z), LEVELS - z)
        inside = rounded == codes
        total += g * (codes - tl.where(inside, steps, 0.0))
        if MOVING:
            d_w = tl.where(inside, g, 0.0).to(d_weight_ptr.dtype.element_ty)
            tl.store(d_weight_ptr + start_of_row + column, d_w, mask=mask)
        if OWN_RANGE:
            at_lo += tl.where(mask & (w == lo[:, None]), 1.0, 0.0)
            at_hi += tl.where(mask & (w == hi[:, None]), 1.0, 0.0)
    d_range = tl.where(scale < _TINY, 0.0, tl.div_rn(tl.sum(total, axis=1), LEVELS * 1.0))
    d_min, d_max = _share(d_range, xmin, xmax, SYMMETRIC)
    tl.store(d_upper_ptr + row, (d_max * xmax * (1.0 - keep_hi)).to(d_upper_ptr.dtype.element_ty), mask=there)
    tl.store(d_lower_ptr + row, (d_min * xmin * (1.0 - keep_lo)).to(d_lower_ptr.dtype.element_ty), mask=there)
    d_lo, d_hi = d_min * keep_lo, d_max * keep_hi
    if OWN_RANGE:
        to_lo = (d_lo / tl.maximum(tl.sum(at_lo, axis=1), 1.0))[:, None]
        to_hi = (d_hi / tl.maximum(tl.sum(at_hi, axis=1), 1.0))[:, None]
        tl.debug_barrier()  # not before the stores above
        _add_at_extremes(
            grad_ptr, weight_ptr, d_weight_ptr, there, size, lo[:, None], hi[:, None], to_lo, to_hi, s, z, inverse,
            start_of_row, LEVELS, COLUMNS,
        )  # fmt: skip
    elif MOVING:
        tl.store(d_hi_ptr + row, d_hi.to(d_hi_ptr.dtype.element_ty), mask=there)
        tl.store(d_lo_ptr + row, d_lo.to(d_lo_ptr.dtype.element_ty), mask=there)


def forward(
    weight: Tensor,
    lo: Tensor,
    hi: Tensor,
    upper: Tensor,
    lower: Tensor,
    bits: int,
    symmetric: bool,
    out_dtype: torch.dtype,
) -> tuple[Tensor, Tensor, Tensor]:
    """As ``omniq.kernels.fake_quant_torch.forward``."""
    weight, lo, hi, upper, lower = (each.contiguous() for each in (weight, lo, hi, upper, lower))
    out, found = torch.empty_like(weight, dtype=out_dtype), room_for_range(weight, lo, upper)
    own_range = lo.numel() == 0
    lo, hi = found if own_range else (lo, hi)
    size, rows, columns, programs = _plan(weight, upper)
    with torch.cuda.device(weight.device):
        _forward[(programs,)](
            weight, lo, hi, upper, lower, out, upper.numel(), size, LEVELS=2**bits - 1, SYMMETRIC=symmetric,
            OWN_RANGE=own_range, ROWS=rows, COLUMNS=columns, num_warps=_WARPS,
        )  # fmt: skip
    return out, *found


def backward(
    grad: Tensor,
    weight: Tensor,
    lo: Tensor,
    hi: Tensor,
    upper: Tensor,
    lower: Tensor,
    bits: int,
    symmetric: bool,
    moving: bool,
    own_range: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """As ``omniq.kernels.fake_quant_torch.backward``."""
    grad, weight, lo, hi, upper, lower = (each.contiguous() for each in (grad, weight, lo, hi, upper, lower))
    made = room_for_gradients(weight, lo, hi, upper, lower, moving, own_range)
    size, rows, columns, programs = _plan(weight, upper)
    with torch.cuda.device(weight.device):
        _backward[(programs,)](
            grad, weight, lo, hi, upper, lower, *made, upper.numel(), size, LEVELS=2**bits - 1, SYMMETRIC=symmetric,
            MOVING=moving, OWN_RANGE=own_range, ROWS=rows, COLUMNS=columns, num_warps=_WARPS,
        )  # fmt: skip
    return made


def _plan(weight: Tensor, upper: Tensor) -> tuple[int, int, int, int]:
    """Group size, groups and columns of a tile, and programs."""
    size = weight.numel() // upper.numel()
    columns = min(triton.next_power_of_2(size), _TILE)
    rows = _TILE // columns
    return size, rows, columns, triton.cdiv(upper.numel(), rows)
