# SPDX-License-Identifier: Apache-2.0
"""The fused fake quantization of ``omniq.kernels.fake_quant`` in Triton: the weight read once, the result written once.

The weight ``[o, i]`` is taken as ``[groups, g]``, one learned range each. A program owns ``ROWS`` whole groups and
walks along them ``COLUMNS`` weights at a time, so a group size of 16 and a row of 28672 run in the same two kernels,
widths that are no power of two are masked, and the sum over a group needs neither atomics nor a second pass: results
are deterministic.

    forward    load range and logits -> s, z;       per tile: load w, store (clamp(round(w / s), -z, L - z)) s
    backward   load range and logits -> s, z again; per tile: load w and dLoss/dw^, accumulate g_s; store the gradients

Weights travel in their own dtype (half: 4 bytes a weight forward, 4 backward, which is the floor); everything in
registers is float32, so that codes equal those of the torch version up to last bits of sigmoid and quotient. Rounding
half to even adds and subtracts ``1.5 * 2^23``; quotients for which that is not exact are outside the grid by far. What
is not a number stays so, as in torch: whoever guards the loss must see it.

Import this module only where Triton exists; ``omniq.kernels.fake_quant`` decides.

Shapes: ``o`` output features, ``i`` input features, ``G`` groups in a row, ``g`` group size.
"""
# mypy: allow-untyped-defs
# Triton reads types out of annotations: kernels have none but constexpr.

import torch
import triton
import triton.language as tl
from torch import Tensor

from omniq.kernels.fake_quant_torch import room_for_gradients

_TILE = 2048  # weights a program holds at a time: each thread of 4 warps loads twice 16 bytes of half precision
_WARPS = 4
TINY = tl.constexpr(torch.finfo(torch.float32).tiny)  # the least scale
_MAGIC = tl.constexpr(1.5 * 2.0**23)  # a sum with it has no bits left for a fraction
_NAN = tl.constexpr(tl.PropagateNan.ALL)


@triton.jit
def nearest(x):
    """Half to even; of up to 2^22."""
    return (x + _MAGIC) - _MAGIC


@triton.jit
def between(x, least, most):
    """``x`` clamped, or not a number."""
    return tl.minimum(tl.maximum(x, least, propagate_nan=_NAN), most, propagate_nan=_NAN)


@triton.jit
def quotient(w, s, inverse):
    """``w / s``. A correction by the remainder makes the product with ``1 / s`` an IEEE quotient, but for rare last
    bits, at a third of the instructions of a division. (It may not overflow, and cannot: no weight exceeds its range,
    and a step is a share of that.)"""
    guess = w * inverse
    return tl.fma(tl.fma(-guess, s, w), inverse, guess)


@triton.jit
def rounded_to(w, s, z, LEVELS: tl.constexpr):
    """The fake-quantized weight; bounds are integers, so clamping first is the same."""
    return nearest(between(quotient(w, s, tl.div_rn(1.0, s)), -z, LEVELS - z)) * s


@triton.jit
def learned_grid(lo, hi, upper_ptr, lower_ptr, row, there, LEVELS: tl.constexpr, SYMMETRIC: tl.constexpr):
    """Kept shares of lo and hi, clipped range, scale before its floor, and zero point of each group, ``[ROWS]``."""
    keep_lo = tl.sigmoid(tl.load(lower_ptr + row, mask=there, other=0.0).to(tl.float32))
    keep_hi = tl.sigmoid(tl.load(upper_ptr + row, mask=there, other=0.0).to(tl.float32))
    xmin, xmax = keep_lo * lo, keep_hi * hi
    if SYMMETRIC:
        scale = tl.div_rn(2.0 * tl.maximum(xmax, -xmin), LEVELS * 1.0)
        zero = tl.full(scale.shape, (LEVELS + 1) // 2, tl.float32)
    else:
        scale = tl.div_rn(xmax - xmin, LEVELS * 1.0)
        zero = between(nearest(tl.div_rn(-xmin, floored(scale))), 0.0, LEVELS * 1.0)
    return keep_lo, keep_hi, xmin, xmax, scale, zero


@triton.jit
def floored(scale):
    """A scale that can be divided by."""
    return tl.maximum(scale, TINY, propagate_nan=_NAN)


@triton.jit
def share(d_range, xmin, xmax, SYMMETRIC: tl.constexpr):
    """Gradients of xmin and xmax: opposite, or symmetric twice to the larger side, once to each in a tie."""
    if SYMMETRIC:
        d_min = -d_range * tl.where(-xmin > xmax, 2.0, tl.where(xmax == -xmin, 1.0, 0.0))
        d_max = d_range * tl.where(xmax > -xmin, 2.0, tl.where(xmax == -xmin, 1.0, 0.0))
    else:
        d_min, d_max = -d_range, d_range
    return d_min, d_max


@triton.jit
def fake_quant_forward(
    weight_ptr, lo_ptr, hi_ptr, upper_ptr, lower_ptr, out_ptr, groups, size,
    LEVELS: tl.constexpr, SYMMETRIC: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    there = row < groups
    start_of_row = row.to(tl.int64)[:, None] * size
    lo = tl.load(lo_ptr + row, mask=there, other=0.0).to(tl.float32)
    hi = tl.load(hi_ptr + row, mask=there, other=0.0).to(tl.float32)
    _, _, _, _, scale, zero = learned_grid(lo, hi, upper_ptr, lower_ptr, row, there, LEVELS, SYMMETRIC)
    s, z = floored(scale)[:, None], zero[:, None]
    for start in range(0, size, COLUMNS):
        column = start + tl.arange(0, COLUMNS)[None, :]
        mask = there[:, None] & (column < size)
        w = tl.load(weight_ptr + start_of_row + column, mask=mask, other=0.0).to(tl.float32)
        tl.store(out_ptr + start_of_row + column, rounded_to(w, s, z, LEVELS).to(out_ptr.dtype.element_ty), mask=mask)


@triton.jit
def fake_quant_backward(
    grad_ptr, weight_ptr, lo_ptr, hi_ptr, upper_ptr, lower_ptr,
    d_weight_ptr, d_lo_ptr, d_hi_ptr, d_upper_ptr, d_lower_ptr, groups, size,
    LEVELS: tl.constexpr, SYMMETRIC: tl.constexpr, MOVING: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    there = row < groups
    lo = tl.load(lo_ptr + row, mask=there, other=0.0).to(tl.float32)
    hi = tl.load(hi_ptr + row, mask=there, other=0.0).to(tl.float32)
    keep_lo, keep_hi, xmin, xmax, scale, zero = learned_grid(
        lo, hi, upper_ptr, lower_ptr, row, there, LEVELS, SYMMETRIC
    )
    s, z = floored(scale)[:, None], zero[:, None]
    inverse = tl.div_rn(1.0, s)
    start_of_row = row.to(tl.int64)[:, None] * size
    total = tl.zeros([ROWS, COLUMNS], tl.float32)
    for start in range(0, size, COLUMNS):
        column = start + tl.arange(0, COLUMNS)[None, :]
        mask = there[:, None] & (column < size)
        w = tl.load(weight_ptr + start_of_row + column, mask=mask, other=0.0).to(tl.float32)
        g = tl.load(grad_ptr + start_of_row + column, mask=mask, other=0.0).to(tl.float32)
        steps = quotient(w, s, inverse)
        rounded = nearest(steps)
        codes = between(rounded, -z, LEVELS - z)
        inside = rounded == codes
        total += g * (codes - tl.where(inside, steps, 0.0))
        if MOVING:
            d_w = tl.where(inside, g, 0.0).to(d_weight_ptr.dtype.element_ty)
            tl.store(d_weight_ptr + start_of_row + column, d_w, mask=mask)
    d_range = tl.where(scale < TINY, 0.0, tl.div_rn(tl.sum(total, axis=1), LEVELS * 1.0))
    d_min, d_max = share(d_range, xmin, xmax, SYMMETRIC)
    tl.store(d_upper_ptr + row, (d_max * xmax * (1.0 - keep_hi)).to(d_upper_ptr.dtype.element_ty), mask=there)
    tl.store(d_lower_ptr + row, (d_min * xmin * (1.0 - keep_lo)).to(d_lower_ptr.dtype.element_ty), mask=there)
    if MOVING:
        tl.store(d_hi_ptr + row, (d_max * keep_hi).to(d_hi_ptr.dtype.element_ty), mask=there)
        tl.store(d_lo_ptr + row, (d_min * keep_lo).to(d_lo_ptr.dtype.element_ty), mask=there)


def forward(
    weight: Tensor,
    lo: Tensor,
    hi: Tensor,
    upper: Tensor,
    lower: Tensor,
    bits: int,
    symmetric: bool,
    out_dtype: torch.dtype,
) -> Tensor:
    """As ``omniq.kernels.fake_quant_torch.forward``."""
    weight, lo, hi, upper, lower = (each.contiguous() for each in (weight, lo, hi, upper, lower))
    out = torch.empty_like(weight, dtype=out_dtype)
    size, rows, columns, programs = _plan(weight, upper)
    with torch.cuda.device(weight.device):
        fake_quant_forward[(programs,)](
            weight, lo, hi, upper, lower, out, upper.numel(), size, LEVELS=2**bits - 1, SYMMETRIC=symmetric,
            ROWS=rows, COLUMNS=columns, num_warps=_WARPS,
        )  # fmt: skip
    return out


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
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """As ``omniq.kernels.fake_quant_torch.backward``."""
    grad, weight, lo, hi, upper, lower = (each.contiguous() for each in (grad, weight, lo, hi, upper, lower))
    made = room_for_gradients(weight, lo, hi, upper, lower, moving)
    size, rows, columns, programs = _plan(weight, upper)
    with torch.cuda.device(weight.device):
        fake_quant_backward[(programs,)](
            grad, weight, lo, hi, upper, lower, *made, upper.numel(), size, LEVELS=2**bits - 1, SYMMETRIC=symmetric,
            MOVING=moving, ROWS=rows, COLUMNS=columns, num_warps=_WARPS,
        )  # fmt: skip
    return made


def _plan(weight: Tensor, upper: Tensor) -> tuple[int, int, int, int]:
    """Group size, groups and columns of a tile, and programs."""
    size = weight.numel() // upper.numel()
    columns = min(triton.next_power_of_2(size), _TILE)
    rows = _TILE // columns
    return size, rows, columns, triton.cdiv(upper.numel(), rows)
