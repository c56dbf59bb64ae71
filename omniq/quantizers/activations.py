# SPDX-License-Identifier: Apache-2.0
"""Fake quantization of activations: dynamic per token, or static per tensor.

For a token ``x`` with range ``m = min(x, 0)``, ``M = max(x, 0)``, ``b`` bits, codes ``-2^(b-1) .. 2^(b-1) - 1`` and
``L = 2^b - 1``:

    s = (M - m) / L    or  2 max(M, -m) / L          asymmetric or symmetric
    z = round(-2^(b-1) - m / s)   or  0              an integer inside the code range
    x^ = (round(clamp(x / s + z)) - z) s

These are the operations, in the dtype of ``x``, of the int-quantized runtime of compressed-tensors when transformers
runs an exported model (signed codes, ``z`` added before rounding, a scale of zero replaced by the dtype's epsilon). So
a reloaded model computes the numbers that were optimised, with three reservations:

- symmetric scales are ``max|x| / (L / 2)``, not ``max|x| / 127``: the largest positive value clips by half a step;
- for two-dimensional inputs the runtime uses one range for the whole tensor, while here a token is always the last
  dimension (a family whose block flattens tokens before a linear, as OPT does, reloads to other numbers there);
- GPU runtimes may compute in float32: they agree up to the rounding of half precision.

``StaticGrid`` uses one fixed range for all tokens. While a block is calibrated that range is not final, because a
transform changes it with every step. There ``quantize_samples`` gives each sample its own range, and the gradient of
the extremes reaches the transform.

The gradient is that of the paper (arXiv 2308.13137; its code does not detach the range): straight-through for the
rounding, zero through ``z``, and through ``s`` to the extreme elements, with equal shares for ties. With
``G = dLoss/dx^`` and ``in`` true where the rounded code is not clipped:

    g_s = sum over the token of G ((q - z) - in x / s),    d x = in G + [x = M] g_s / L - [x = m] g_s / L

(``2 / L``, for the larger side only, if symmetric; no gradient to a bound that is the included zero). It is computed
analytically with ``g_s`` in float32, from ``x`` and its range: autograd would form ``x / s^2``, which overflows in
float16 at 8 bits, and keep six copies of ``x``. No operation synchronizes with the host.

``quantize_tokens_reference`` states this in torch, and runs on the CPU. On CUDA the operator
``omniq::quantize_tokens`` does the same in one kernel each way (``omniq.kernels.token_quant_triton``), opaque to
torch.compile and safe inside CUDA graphs.

Shapes: ``...`` any leading dimensions (samples, tokens, heads), ``c`` channels of a token.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from omniq.grid.affine import Grid
from omniq.kernels.fused import implementation, is_fused, packed


def quantize_tokens(x: Tensor, bits: int, symmetric: bool = False, dtype: torch.dtype | None = None) -> Tensor:
    """Fake-quantize each token of ``[..., c]`` on its own range; differentiable.

    Args:
        x: ``[..., c]``, any floating dtype and layout.
        bits: 2 to 8.
        symmetric: no zero point.
        dtype: dtype that ``x`` is converted to first, and of the result; by default that of ``x``.
    """
    dtype = dtype or x.dtype
    if is_fused(x) and dtype != torch.float64:
        return _fused(x, bits, symmetric, dtype)
    return quantize_tokens_reference(x.to(dtype), bits, symmetric)


def quantize_tokens_reference(x: Tensor, bits: int, symmetric: bool = False) -> Tensor:
    """``quantize_tokens`` in plain torch: the specification, a dozen passes over ``x``."""
    return _Tokens.apply(x, bits, symmetric)


def quantize_samples(x: Tensor, bits: int, symmetric: bool = False) -> Tensor:
    """Fake-quantize each sample of ``[n, t, c]`` on its own range; differentiable."""
    return quantize_tokens_reference(x.flatten(1), bits, symmetric).view(x.shape)


def quantize_static(x: Tensor, scale: Tensor, zero_point: Tensor, bits: int) -> Tensor:
    """Fake-quantize on a fixed grid; straight-through inside the range, no gradient outside.

    Args:
        x: any shape and floating dtype; the result has the same.
        scale, zero_point: broadcastable to ``x``; the zero point in the signed code range.
        bits: 2 to 8.
    """
    return _Static.apply(x, scale, zero_point, bits)


def fit_range(lo: Tensor, hi: Tensor, bits: int, symmetric: bool) -> tuple[Tensor, Tensor]:
    """Scale and signed zero point that cover ``[lo, hi]`` and zero, in the dtype of the range."""
    lo, hi = lo.clamp(max=0), hi.clamp(min=0)
    least, most = -(2 ** (bits - 1)), 2 ** (bits - 1) - 1
    max_code = lo.new_full((), most - least)  # a tensor, because CUDA divides by a Python number through its reciprocal
    scale = torch.maximum(-lo, hi) / (max_code / 2) if symmetric else (hi - lo) / max_code
    # NOTE: torch.where with a Python number copies it from the host, which a CUDA graph cannot capture
    scale = scale.masked_fill(scale == 0, torch.finfo(scale.dtype).eps)
    if symmetric:
        return scale, torch.zeros_like(scale)
    return scale, (least - lo / scale).clamp(least, most).round()


@dataclass(frozen=True)
class StaticGrid:
    """Static fake quantization: one range for the whole input of a linear, determined beforehand.

    Args:
        scale: ``[1]``, in the dtype of the exported model.
        zero_point: int8 ``[1]``, in the signed code range; 0 on a symmetric grid.
    """

    scale: Tensor
    zero_point: Tensor

    @classmethod
    def fit(cls, lo: Tensor, hi: Tensor, bits: int, symmetric: bool, dtype: torch.dtype) -> "StaticGrid":
        """The grid that covers ``[lo, hi]`` and zero, on the CPU; the zero point fits the rounded scale.

        Args:
            lo, hi: scalars.
            bits: 2 to 8.
            symmetric: no zero point.
            dtype: dtype of the exported model.
        """
        scale, unsigned = Grid(bits, symmetric=symmetric, scale_dtype=dtype).fit(lo.reshape(1), hi.reshape(1))
        return cls(scale.to("cpu", dtype), (unsigned - 2 ** (bits - 1)).to("cpu", torch.int8))

    def quantize(self, x: Tensor, bits: int) -> Tensor:
        """Fake-quantize any shape and floating dtype; the result has the same."""
        return quantize_static(x, self.scale.to(x), self.zero_point.to(x), bits)


@torch.library.custom_op("omniq::quantize_tokens", mutates_args=())
def _fused(x: Tensor, bits: int, symmetric: bool, dtype: torch.dtype) -> Tensor:
    return implementation("token_quant", fused=True).forward(x, bits, symmetric, dtype)


@_fused.register_fake
def _(x: Tensor, bits: int, symmetric: bool, dtype: torch.dtype) -> Tensor:
    return torch.empty_like(packed(x), dtype=dtype)


@torch.library.custom_op("omniq::quantize_tokens_backward", mutates_args=())
def _fused_backward(grad: Tensor, x: Tensor, bits: int, symmetric: bool) -> Tensor:
    return implementation("token_quant", fused=True).backward(grad, x, bits, symmetric)


@_fused_backward.register_fake
def _(grad: Tensor, x: Tensor, bits: int, symmetric: bool) -> Tensor:
    return torch.empty_like(packed(x))


def _setup_context(ctx: Any, inputs: tuple, output: Tensor) -> None:
    x, ctx.bits, ctx.symmetric, _ = inputs
    ctx.save_for_backward(x)


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None]:
    return _fused_backward(grad, *ctx.saved_tensors, ctx.bits, ctx.symmetric), None, None, None


_fused.register_autograd(_backward, setup_context=_setup_context)


class _Tokens(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, bits: int, symmetric: bool) -> Tensor:
        lo, hi = x.aminmax(dim=-1, keepdim=True)
        scale, zero = fit_range(lo, hi, bits, symmetric)
        codes, _ = _codes(x, scale, zero, bits)
        ctx.save_for_backward(x, lo, hi)
        ctx.bits, ctx.symmetric = bits, symmetric
        return codes.sub_(zero).mul_(scale)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        x, lo, hi = ctx.saved_tensors
        max_code = 2**ctx.bits - 1
        scale, zero = fit_range(lo, hi, ctx.bits, ctx.symmetric)
        codes, inside = _codes(x, scale, zero, ctx.bits)
        wide = torch.promote_types(x.dtype, torch.float32)  # in half precision a residual vanishes beside a code of 100
        residual = codes.sub_(zero).to(wide).sub_((x.to(wide) / scale.to(wide)).mul_(inside))  # [..., c]
        d_scale = residual.mul_(grad).sum(-1, keepdim=True) / max_code  # [..., 1]
        d_lo, d_hi = -d_scale * (lo < 0), d_scale * (hi > 0)
        if ctx.symmetric:
            tie_share = torch.heaviside(hi.clamp(min=0) + lo.clamp(max=0), hi.new_full((), 0.5))
            d_lo, d_hi = 2 * (1 - tie_share) * d_lo, 2 * tie_share * d_hi
        d_x = grad * inside
        for bound, d_bound in ((lo, d_lo), (hi, d_hi)):
            extreme = (x == bound).to(d_bound.dtype)
            d_x += (extreme * (d_bound / extreme.sum(-1, keepdim=True))).to(d_x.dtype)
        return d_x, None, None


class _Static(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, scale: Tensor, zero_point: Tensor, bits: int) -> Tensor:
        codes, inside = _codes(x, scale, zero_point, bits)
        ctx.save_for_backward(inside)
        return codes.sub_(zero_point).mul_(scale)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None]:
        (inside,) = ctx.saved_tensors
        return grad * inside, None, None, None


def _codes(x: Tensor, scale: Tensor, zero: Tensor, bits: int) -> tuple[Tensor, Tensor]:
    """Signed codes as floats, and the mask of codes that are not clipped."""
    least, most = -(2 ** (bits - 1)), 2 ** (bits - 1) - 1
    codes = (x / scale).add_(zero)
    rounded = codes.round()
    inside = (rounded >= least) & (rounded <= most)
    return codes.clamp_(least, most).round_(), inside
