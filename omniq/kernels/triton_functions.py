# SPDX-License-Identifier: Apache-2.0
"""Device functions that several Triton kernels share: rounding, clamping, quotients and the learned grid.

All arithmetic is float32. Import this module only where Triton exists.
"""
# mypy: allow-untyped-defs
# Triton reads types out of annotations, so kernels annotate constexpr arguments only.

import torch
import triton
import triton.language as tl

TINY = tl.constexpr(torch.finfo(torch.float32).tiny)  # the smallest scale
_MAGIC = tl.constexpr(1.5 * 2.0**23)  # a sum with it has no bits left for a fraction
_NAN = tl.constexpr(tl.PropagateNan.ALL)


@triton.jit
def nearest(x):
    """Round half to even by adding and subtracting ``1.5 * 2^23``; exact up to 2^22, far outside every grid."""
    return (x + _MAGIC) - _MAGIC


@triton.jit
def clamp(x, least, most):
    """``x`` clamped to ``[least, most]``; NaN stays NaN."""
    return tl.minimum(tl.maximum(x, least, propagate_nan=_NAN), most, propagate_nan=_NAN)


@triton.jit
def quotient(w, s, inverse):
    """``w / s``, given ``inverse = 1 / s``.

    A correction by the remainder makes the product with ``1 / s`` an IEEE quotient, except for rare last bits, at a
    third of the instructions of a division. It cannot overflow: no weight exceeds its range, and a step is a fraction
    of the range.
    """
    guess = w * inverse
    return tl.fma(tl.fma(-guess, s, w), inverse, guess)


@triton.jit
def round_to_grid(w, s, z, MAX_CODE: tl.constexpr):
    """The fake-quantized weight. The bounds are integers, so clamping before rounding gives the same result."""
    return nearest(clamp(quotient(w, s, tl.div_rn(1.0, s)), -z, MAX_CODE - z)) * s


@triton.jit
def at_least_tiny(scale):
    """A scale that is safe to divide by."""
    return tl.maximum(scale, TINY, propagate_nan=_NAN)


@triton.jit
def learned_grid(lo, hi, upper_ptr, lower_ptr, group, valid, MAX_CODE: tl.constexpr, SYMMETRIC: tl.constexpr):
    """Kept fractions of lo and hi, clipped range, scale before ``at_least_tiny``, and zero point of each group."""
    keep_lo = tl.sigmoid(tl.load(lower_ptr + group, mask=valid, other=0.0).to(tl.float32))
    keep_hi = tl.sigmoid(tl.load(upper_ptr + group, mask=valid, other=0.0).to(tl.float32))
    xmin, xmax = keep_lo * lo, keep_hi * hi
    if SYMMETRIC:
        scale = tl.div_rn(2.0 * tl.maximum(xmax, -xmin), MAX_CODE * 1.0)
        zero = tl.full(scale.shape, (MAX_CODE + 1) // 2, tl.float32)
    else:
        scale = tl.div_rn(xmax - xmin, MAX_CODE * 1.0)
        zero = clamp(nearest(tl.div_rn(-xmin, at_least_tiny(scale))), 0.0, MAX_CODE * 1.0)
    return keep_lo, keep_hi, xmin, xmax, scale, zero


@triton.jit
def split_range_gradient(d_range, xmin, xmax, SYMMETRIC: tl.constexpr):
    """Gradients of xmin and xmax: opposite; or, if symmetric, twice to the larger side and once to each in a tie."""
    if SYMMETRIC:
        d_min = -d_range * tl.where(-xmin > xmax, 2.0, tl.where(xmax == -xmin, 1.0, 0.0))
        d_max = d_range * tl.where(xmax > -xmin, 2.0, tl.where(xmax == -xmin, 1.0, 0.0))
    else:
        d_min, d_max = -d_range, d_range
    return d_min, d_max


@triton.jit
def range_gradients(d_scale, scale, xmin, xmax, MAX_CODE: tl.constexpr, SYMMETRIC: tl.constexpr):
    """Gradients of xmin and xmax, given that of the scale; zero if the scale was raised to ``TINY``."""
    d_range = tl.where(scale < TINY, 0.0, tl.div_rn(d_scale, MAX_CODE * 1.0))
    return split_range_gradient(d_range, xmin, xmax, SYMMETRIC)


@triton.jit
def code_gradients(g, w, s, z, inverse, MAX_CODE: tl.constexpr):
    """Codes less their zero point, and, given ``dLoss/dw^``, what each weight adds to the scale and passes through."""
    steps = quotient(w, s, inverse)
    rounded = nearest(steps)
    codes = clamp(rounded, -z, MAX_CODE - z)
    inside = rounded == codes
    return codes, g * (codes - tl.where(inside, steps, 0.0)), tl.where(inside, g, 0.0)


@triton.jit
def store(pointer, at, value, valid):
    """Store a value in the dtype of its destination."""
    tl.store(pointer + at, value.to(pointer.dtype.element_ty), mask=valid)
