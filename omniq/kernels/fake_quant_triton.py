# SPDX-License-Identifier: Apache-2.0
"""The fused fake quantization of ``omniq.kernels.fake_quant`` in Triton: one read of the weight, one write of the result.

The weight ``[o, i]`` is taken as ``[groups, g]``, one learned range each. A program owns ``ROWS`` whole groups and walks
along them ``COLUMNS`` weights at a time, so a group size of 16 and a row of 28672 run in the same two kernels, widths
that are no power of two are masked, and the sum over a group needs neither atomics nor a second pass: results are
deterministic.

    forward    load range and logits -> s, z;       per tile: load w, store (clamp(round(w / s), -z, L - z)) s
    backward   load range and logits -> s, z again; per tile: load w and dLoss/dw^, accumulate g_s; store the gradients

Weights travel in their own dtype (half: 4 bytes a weight forward, 4 backward, which is the floor); everything in
registers is float32, so that codes equal those of the torch version up to last bits of sigmoid and quotient. Rounding half to even adds and subtracts ``1.5 * 2^23``; the quotient is first clamped to +-512, beyond which
every code is clipped anyway (``z`` and ``L`` are at most 255).

Import this module only where Triton exists; ``omniq.kernels.fake_quant`` decides.

Shapes: ``o`` output features, ``i`` input features, ``G`` groups in a row, ``g`` group size.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

_TILE = 2048  # weights a program holds at a time: 4 warps, each thread with two 16-byte loads of half precision a tensor
_WARPS = 4
_TINY = tl.constexpr(torch.finfo(torch.float32).tiny)  # the least scale
_MAGIC = tl.constexpr(1.5 * 2.0**23)  # a sum with it has no bits left for a fraction


@triton.jit
def _round(x):  # type: ignore[no-untyped-def]  # Triton reads constants from annotations
    return (x + _MAGIC) - _MAGIC


@triton.jit
def _steps(w, s, inverse):  # type: ignore[no-untyped-def]
    """``w / s``, clamped. One step of Newton on the remainder makes the product with ``1 / s`` an IEEE quotient (but for
    rare last bits) at a third of the instructions of a division."""
    guess = w * inverse
    quotient = tl.fma(tl.fma(-guess, s, w), inverse, guess)
    return tl.minimum(tl.maximum(quotient, -512.0), 512.0)


@triton.jit
def _load_grid(lo_ptr, hi_ptr, upper_ptr, lower_ptr, row, there, LEVELS: tl.constexpr, SYMMETRIC: tl.constexpr):  # type: ignore[no-untyped-def]
    """Kept shares of lo and hi, clipped range, scale before its floor, and zero point of each group, ``[ROWS]``."""
    keep_lo = tl.sigmoid(tl.load(lower_ptr + row, mask=there, other=0.0).to(tl.float32))
    keep_hi = tl.sigmoid(tl.load(upper_ptr + row, mask=there, other=0.0).to(tl.float32))
    xmin = keep_lo * tl.load(lo_ptr + row, mask=there, other=0.0).to(tl.float32)
    xmax = keep_hi * tl.load(hi_ptr + row, mask=there, other=0.0).to(tl.float32)
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
    LEVELS: tl.constexpr, SYMMETRIC: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # type: ignore[no-untyped-def]  # fmt: skip
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    there = row < groups
    _, _, _, _, scale, zero = _load_grid(lo_ptr, hi_ptr, upper_ptr, lower_ptr, row, there, LEVELS, SYMMETRIC)
    s, z = tl.maximum(scale, _TINY)[:, None], zero[:, None]
    inverse = tl.div_rn(1.0, s)
    start_of_row = row.to(tl.int64)[:, None] * size
    for start in range(0, size, COLUMNS):
        column = start + tl.arange(0, COLUMNS)[None, :]
        mask = there[:, None] & (column < size)
        w = tl.load(weight_ptr + start_of_row + column, mask=mask, other=0.0).to(tl.float32)
        steps = _steps(w, s, inverse)
        codes = tl.minimum(tl.maximum(_round(steps), -z), LEVELS - z)
        tl.store(out_ptr + start_of_row + column, (codes * s).to(out_ptr.dtype.element_ty), mask=mask)


@triton.jit
def _backward(
    grad_ptr, weight_ptr, lo_ptr, hi_ptr, upper_ptr, lower_ptr,
    d_weight_ptr, d_lo_ptr, d_hi_ptr, d_upper_ptr, d_lower_ptr, groups, size,
    LEVELS: tl.constexpr, SYMMETRIC: tl.constexpr, MOVING: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # type: ignore[no-untyped-def]  # fmt: skip
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    there = row < groups
    keep_lo, keep_hi, xmin, xmax, scale, zero = _load_grid(
        lo_ptr, hi_ptr, upper_ptr, lower_ptr, row, there, LEVELS, SYMMETRIC
    )
    s, z = tl.maximum(scale, _TINY)[:, None], zero[:, None]
    inverse = tl.div_rn(1.0, s)
    start_of_row = row.to(tl.int64)[:, None] * size
    total = tl.zeros([ROWS, COLUMNS], tl.float32)
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
    d_range = tl.where(scale < _TINY, 0.0, tl.div_rn(tl.sum(total, axis=1), LEVELS * 1.0))
    if SYMMETRIC:  # twice to the larger side, once to each in a tie
        d_max = d_range * tl.where(xmax > -xmin, 2.0, tl.where(xmax == -xmin, 1.0, 0.0))
        d_min = -d_range * tl.where(-xmin > xmax, 2.0, tl.where(xmax == -xmin, 1.0, 0.0))
    else:
        d_max, d_min = d_range, -d_range
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
    """``w^`` in ``out_dtype``, ``[o, i]``; arguments as in ``fake_quantize``."""
    weight, lo, hi, upper, lower = (each.contiguous() for each in (weight, lo, hi, upper, lower))
    out = torch.empty_like(weight, dtype=out_dtype)
    size, rows, columns, programs = _plan(weight, lo)
    with torch.cuda.device(weight.device):
        _forward[(programs,)](
            weight, lo, hi, upper, lower, out, lo.numel(), size,
            LEVELS=2**bits - 1, SYMMETRIC=symmetric, ROWS=rows, COLUMNS=columns, num_warps=_WARPS,
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
    """Gradients of weight, lo, hi, upper, lower, each in its own dtype; the first three are empty unless ``moving``."""
    grad, weight, lo, hi, upper, lower = (each.contiguous() for each in (grad, weight, lo, hi, upper, lower))
    constants = (weight, lo, hi) if moving else (weight[:0], lo[:0], hi[:0])
    d_weight, d_lo, d_hi, d_upper, d_lower = (torch.empty_like(each) for each in (*constants, upper, lower))
    size, rows, columns, programs = _plan(weight, lo)
    with torch.cuda.device(weight.device):
        _backward[(programs,)](
            grad, weight, lo, hi, upper, lower, d_weight, d_lo, d_hi, d_upper, d_lower, lo.numel(), size,
            LEVELS=2**bits - 1, SYMMETRIC=symmetric, MOVING=moving, ROWS=rows, COLUMNS=columns, num_warps=_WARPS,
        )  # fmt: skip
    return d_weight, d_lo, d_hi, d_upper, d_lower


def _plan(weight: Tensor, lo: Tensor) -> tuple[int, int, int, int]:
    """Group size, groups and columns of a tile, and programs."""
    size = weight.numel() // lo.numel()
    columns = min(triton.next_power_of_2(size), _TILE)
    rows = _TILE // columns
    return size, rows, columns, triton.cdiv(lo.numel(), rows)
