# SPDX-License-Identifier: Apache-2.0
"""The fused ``omniq.quantizers.activations.quantize_tokens`` in Triton: a token is read once, its result written once.

    forward    x -> range, s, z -> (clamp(round(x / s + z)) - z) s
    backward   x, G -> range, s, z, codes again -> g_s -> d x

The torch reference rounds to the dtype of ``x`` after every operation, as the runtime of compressed-tensors does. Here
every operation is float32 and its result is rounded to that dtype. That is the same, because each operation is one IEEE
operation on numbers that half precision represents. Forward values are therefore equal bit for bit. The gradient is
computed in float32 from the rounded steps and rounded once, where torch rounds the shares of the extremes before it
adds them.

A program loads a few whole tokens into registers, ``[ROWS, COLUMNS]``. A token of more than 16384 channels is read in
several passes instead; the later passes find it in cache. The backward needs only ``x`` from the forward.

A tensor keeps its memory layout, with tokens in any order: queries ``[b, heads, t, c]`` that are a transposed view of
``[b, t, heads c]`` need no copy, and the result has the same layout. A tensor with gaps is copied.

``x`` may be of another dtype than the result (a norm in float32 under autocast): it is rounded when it is loaded, and
the gradient has its dtype.

Import this module only where Triton exists; ``omniq.quantizers.activations`` chooses.
"""
# mypy: allow-untyped-defs
# Triton reads types out of annotations, so kernels annotate constexpr arguments only.

import torch
import triton
import triton.language as tl
from torch import Tensor

from omniq.kernels.fused import layout_of, on_device, packed
from omniq.kernels.triton_functions import clamp, nearest, split_range_gradient

_TILE = 4096  # values of narrow tokens in a program
_WIDEST = 16384  # channels of a token held in registers: 32 in each of 512 threads
_PASS = 8192  # channels at a time of a wider token
_DTYPES = {torch.float16: tl.float16, torch.bfloat16: tl.bfloat16, torch.float32: tl.float32}


@triton.jit
def _as(value, DTYPE: tl.constexpr):
    """The result of an operation in ``DTYPE``, rounded to that dtype."""
    return value.to(DTYPE).to(tl.float32)


@triton.jit
def _grid(lo, hi, MAX_CODE: tl.constexpr, SYMMETRIC: tl.constexpr, EPS: tl.constexpr, DTYPE: tl.constexpr):
    """Scale and signed zero point of each token, as ``omniq.quantizers.activations.fit_range``."""
    if SYMMETRIC:
        scale = _as(tl.div_rn(tl.maximum(-lo, hi), MAX_CODE / 2), DTYPE)
    else:
        scale = _as(tl.div_rn(_as(hi - lo, DTYPE), MAX_CODE * 1.0), DTYPE)
    scale = tl.where(scale == 0.0, EPS, scale)
    if SYMMETRIC:
        zero = tl.zeros_like(scale)
    else:
        zero = _as(-(MAX_CODE + 1) / 2 - _as(tl.div_rn(lo, scale), DTYPE), DTYPE)
        zero = nearest(clamp(zero, -(MAX_CODE + 1) / 2, (MAX_CODE - 1) / 2))
    return scale, zero


@triton.jit
def _codes(x, scale, zero, MAX_CODE: tl.constexpr, DTYPE: tl.constexpr):
    """``x / s``, signed codes minus the zero point, and the mask of codes that are not clipped."""
    steps = tl.div_rn(x, scale)
    rounded = nearest(_as(_as(steps, DTYPE) + zero, DTYPE))
    codes = clamp(rounded, -(MAX_CODE + 1) / 2, (MAX_CODE - 1) / 2)
    return steps, codes - zero, rounded == codes


@triton.jit
def _range(x):
    """Range of each token in registers, zero included, ``[ROWS, 1]``."""
    return tl.minimum(tl.min(x, 1, keep_dims=True), 0.0), tl.maximum(tl.max(x, 1, keep_dims=True), 0.0)


@triton.jit
def _range_in_passes(x_ptr, start, valid, width, COLUMNS: tl.constexpr, DTYPE: tl.constexpr):
    """Range of one token that is read in passes, ``[1, 1]``."""
    lo, hi = tl.zeros([1, COLUMNS], tl.float32), tl.zeros([1, COLUMNS], tl.float32)
    for first in range(0, width, COLUMNS):
        column = first + tl.arange(0, COLUMNS)[None, :]
        x = _as(tl.load(x_ptr + start + column, mask=valid & (column < width), other=0.0), DTYPE)
        lo, hi = tl.minimum(lo, x), tl.maximum(hi, x)
    return _range(lo)[0], _range(hi)[1]


@triton.jit
def _gradient_terms(x, g, lo, hi, scale, zero, MAX_CODE: tl.constexpr, DTYPE: tl.constexpr):
    """For each value: its term of the scale's gradient, its straight-through gradient, and ones at the extremes."""
    steps, codes, inside = _codes(x, scale, zero, MAX_CODE, DTYPE)
    residual, kept = g * (codes - tl.where(inside, steps, 0.0)), tl.where(inside, g, 0.0)
    return residual, kept, tl.where(x == lo, 1.0, 0.0), tl.where(x == hi, 1.0, 0.0)


@triton.jit
def _extreme_gradients(residual, n_lo, n_hi, lo, hi, MAX_CODE: tl.constexpr, SYMMETRIC: tl.constexpr):
    """The gradient that is added to each value at an extreme; zero if the bound is the included zero."""
    d_lo, d_hi = split_range_gradient(tl.div_rn(tl.sum(residual, 1, keep_dims=True), MAX_CODE * 1.0), lo, hi, SYMMETRIC)
    d_lo = tl.where(lo < 0.0, d_lo / tl.maximum(tl.sum(n_lo, 1, keep_dims=True), 1.0), 0.0)
    d_hi = tl.where(hi > 0.0, d_hi / tl.maximum(tl.sum(n_hi, 1, keep_dims=True), 1.0), 0.0)
    return d_lo, d_hi


@triton.jit
def _quantized(x, scale, zero, MAX_CODE: tl.constexpr, DTYPE: tl.constexpr):
    _, codes, _ = _codes(x, scale, zero, MAX_CODE, DTYPE)
    return (codes * scale).to(DTYPE)


@triton.jit
def tokens_forward(
    x_ptr, out_ptr, tokens, width,
    MAX_CODE: tl.constexpr, SYMMETRIC: tl.constexpr, EPS: tl.constexpr, DTYPE: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, IN_REGISTERS: tl.constexpr,
):  # fmt: skip
    token = tl.program_id(0) * ROWS + tl.arange(0, ROWS)[:, None]
    start, valid = token.to(tl.int64) * width, token < tokens
    column = tl.arange(0, COLUMNS)[None, :]
    if IN_REGISTERS:
        mask = valid & (column < width)
        x = _as(tl.load(x_ptr + start + column, mask=mask, other=0.0), DTYPE)
        lo, hi = _range(x)
        scale, zero = _grid(lo, hi, MAX_CODE, SYMMETRIC, EPS, DTYPE)
        tl.store(out_ptr + start + column, _quantized(x, scale, zero, MAX_CODE, DTYPE), mask=mask)
    else:
        lo, hi = _range_in_passes(x_ptr, start, valid, width, COLUMNS, DTYPE)
        scale, zero = _grid(lo, hi, MAX_CODE, SYMMETRIC, EPS, DTYPE)
        for first in range(0, width, COLUMNS):
            offsets, mask = start + first + column, valid & (first + column < width)
            x = _as(tl.load(x_ptr + offsets, mask=mask, other=0.0), DTYPE)
            tl.store(out_ptr + offsets, _quantized(x, scale, zero, MAX_CODE, DTYPE), mask=mask)


@triton.jit
def tokens_backward(
    grad_ptr, x_ptr, d_x_ptr, tokens, width,
    MAX_CODE: tl.constexpr, SYMMETRIC: tl.constexpr, EPS: tl.constexpr, DTYPE: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, IN_REGISTERS: tl.constexpr,
):  # fmt: skip
    token = tl.program_id(0) * ROWS + tl.arange(0, ROWS)[:, None]
    start, valid = token.to(tl.int64) * width, token < tokens
    column = tl.arange(0, COLUMNS)[None, :]
    if IN_REGISTERS:
        mask = valid & (column < width)
        x = _as(tl.load(x_ptr + start + column, mask=mask, other=0.0), DTYPE)
        g = tl.load(grad_ptr + start + column, mask=mask, other=0.0).to(tl.float32)
        lo, hi = _range(x)
        scale, zero = _grid(lo, hi, MAX_CODE, SYMMETRIC, EPS, DTYPE)
        residual, kept, at_lo, at_hi = _gradient_terms(x, g, lo, hi, scale, zero, MAX_CODE, DTYPE)
        to_lo, to_hi = _extreme_gradients(residual, at_lo, at_hi, lo, hi, MAX_CODE, SYMMETRIC)
        d_x = kept + at_lo * to_lo + at_hi * to_hi
        tl.store(d_x_ptr + start + column, d_x.to(d_x_ptr.dtype.element_ty), mask=mask)
    else:
        lo, hi = _range_in_passes(x_ptr, start, valid, width, COLUMNS, DTYPE)
        scale, zero = _grid(lo, hi, MAX_CODE, SYMMETRIC, EPS, DTYPE)
        residual = tl.zeros([ROWS, COLUMNS], tl.float32)
        n_lo, n_hi = tl.zeros([ROWS, COLUMNS], tl.float32), tl.zeros([ROWS, COLUMNS], tl.float32)
        for first in range(0, width, COLUMNS):
            offsets, mask = start + first + column, valid & (first + column < width)
            x = _as(tl.load(x_ptr + offsets, mask=mask, other=0.0), DTYPE)
            g = tl.load(grad_ptr + offsets, mask=mask, other=0.0).to(tl.float32)
            more, _, at_lo, at_hi = _gradient_terms(x, g, lo, hi, scale, zero, MAX_CODE, DTYPE)
            residual, n_lo, n_hi = residual + more, n_lo + at_lo, n_hi + at_hi
        to_lo, to_hi = _extreme_gradients(residual, n_lo, n_hi, lo, hi, MAX_CODE, SYMMETRIC)
        for first in range(0, width, COLUMNS):
            offsets, mask = start + first + column, valid & (first + column < width)
            x = _as(tl.load(x_ptr + offsets, mask=mask, other=0.0), DTYPE)
            g = tl.load(grad_ptr + offsets, mask=mask, other=0.0).to(tl.float32)
            _, kept, at_lo, at_hi = _gradient_terms(x, g, lo, hi, scale, zero, MAX_CODE, DTYPE)
            d_x = kept + at_lo * to_lo + at_hi * to_hi
            tl.store(d_x_ptr + offsets, d_x.to(d_x_ptr.dtype.element_ty), mask=mask)


def forward(x: Tensor, bits: int, symmetric: bool, dtype: torch.dtype) -> Tensor:
    """Fake-quantized tokens ``[..., c]`` in ``dtype``, laid out as ``packed(x)``."""
    x = packed(x)
    out = torch.empty_like(x, dtype=dtype)
    _launch(tokens_forward, (x, out), x, bits, symmetric, dtype)
    return out


def backward(grad: Tensor, x: Tensor, bits: int, symmetric: bool) -> Tensor:
    """The gradient of ``x``, in its dtype; ``grad`` has the dtype of the result."""
    x = packed(x)
    if layout_of(grad) != layout_of(x):
        grad = torch.empty_like(x, dtype=grad.dtype).copy_(grad)
    d_x = torch.empty_like(x)
    _launch(tokens_backward, (grad, x, d_x), x, bits, symmetric, grad.dtype)
    return d_x


def _launch(
    kernel: triton.JITFunction, tensors: tuple[Tensor, ...], x: Tensor, bits: int, symmetric: bool, dtype: torch.dtype
) -> None:
    width = x.shape[-1]
    in_registers = width <= _WIDEST
    columns = triton.next_power_of_2(width) if in_registers else _PASS
    rows = max(1, _TILE // columns) if in_registers else 1
    tokens = x.numel() // width
    with on_device(x):
        kernel[(triton.cdiv(tokens, rows),)](
            *tensors, tokens, width, MAX_CODE=2**bits - 1, SYMMETRIC=symmetric, EPS=torch.finfo(dtype).eps,
            DTYPE=_DTYPES[dtype], ROWS=rows, COLUMNS=columns, IN_REGISTERS=in_registers,
            num_warps=max(1, min(16, rows * columns // 512)),
        )  # fmt: skip
