# SPDX-License-Identifier: Apache-2.0
"""Fake quantization of a weight with learnable clipping: the differentiable heart of OmniQuant.

For a group of weights with range ``lo <= 0 <= hi`` (zero included), ``L = 2^b - 1`` and two learned logits:

    xmax = sigmoid(upper) hi,  xmin = sigmoid(lower) lo           the clipped range (LWC)
    s = (xmax - xmin) / L      or  2 max(xmax, -xmin) / L         asymmetric or symmetric, never below ``tiny``
    z = round(-xmin / s)       or  2^(b-1)
    w^ = (clamp(round(w / s) + z, 0, L) - z) s

Rounding of ``w / s`` is straight-through, ``z`` carries no gradient. With ``G = dLoss/dw^``, codes ``q``, and ``in``
true where ``0 <= round(w / s) + z <= L``:

    g_s = sum over the group of G ((q - z) - in w / s)            zero where s was held at ``tiny``
    d upper = g_s hi / L sigmoid'(upper),  d lower = -g_s lo / L sigmoid'(lower)
    d hi    = g_s sigmoid(upper) / L,      d lo    = -g_s sigmoid(lower) / L
    d w     = in G

A symmetric grid has ``2 / L`` in place of ``1 / L`` and gives the gradient to the larger side only (half to each in a
tie, as ``torch.maximum``). While no transform moves the weights, ``w``, ``lo`` and ``hi`` are constants and only the
logits get a gradient. Under a transform, take ``lo, hi = Grid.range(weight)`` anew in each step: autograd then carries
``d lo`` and ``d hi`` on to the extreme weights, ties shared evenly.

Three versions of one function: ``fake_quantize_reference`` is the text above in differentiable torch, the thing to
read; the operator ``omniq::fake_quantize`` has the analytic gradient, saves nothing but its inputs, and runs in chunks
that stay in a core's cache on the CPU and as one fused Triton kernel on CUDA (``omniq.kernels.fake_quant_triton``).
Arithmetic is float32 whatever the weight's dtype (float64 for float64). The operator is opaque to torch.compile (no
graph break) and safe inside CUDA graphs.

Differences from the published code (arXiv 2308.13137, section 3.2): ranges include zero, so ``0 <= z <= L`` always;
the least scale is the smallest normal number, not 1e-5; a symmetric grid is the one of ``Grid``; nothing of the form
``w / s^2`` is ever computed, which is what overflowed there in float16 at 8 bits. As there, training does not round
the scale to its storage dtype; ``Grid.fit`` does so when the learned clipping is fused.

Shapes: ``o`` output features, ``i`` input features, ``G`` groups in a row.
"""

import functools
import importlib.util
import warnings
from collections.abc import Iterator

import torch
from torch import Tensor

from omniq.quantizers.grid import Grid

# Weights a chunk holds. On the CPU 1 MiB in float32: scratch stays in cache, and calls (2 us) cost little beside
# passes (3072 x 576, 2 cores, forward + backward: 4.5 ms at 2^16, 2.3 at 2^18, 2.0 unchunked).
_CHUNK = 2**18
_CHUNK_DEVICE = 2**24  # elsewhere launches cost more than passes: 64 MiB of float32 scratch


def clip_range(lo: Tensor, hi: Tensor, upper: Tensor, lower: Tensor) -> tuple[Tensor, Tensor]:
    """The learned range ``(sigmoid(lower) lo, sigmoid(upper) hi)`` of each group, ``[o, G]`` each."""
    return lower.sigmoid() * lo, upper.sigmoid() * hi


def fake_quantize(
    weight: Tensor,
    lo: Tensor,
    hi: Tensor,
    upper: Tensor,
    lower: Tensor,
    grid: Grid,
    out_dtype: torch.dtype | None = None,
) -> Tensor:
    """Weights as the clipped grid represents them, differentiable in every tensor argument.

    Args:
        weight: ``[o, i]``, float16, bfloat16, float32 or float64.
        lo, hi: range of each group, ``[o, G]`` with ``lo <= 0 <= hi``, as ``Grid.range`` gives it.
        upper, lower: logits of the share of ``hi`` and ``lo`` that is kept, ``[o, G]``.
        grid: bits and symmetry; the group size follows from the shapes.
        out_dtype: dtype of the result; the weight's by default.

    Returns:
        ``[o, i]``.
    """
    return _fake_quantize(weight, lo, hi, upper, lower, grid.bits, grid.symmetric, out_dtype or weight.dtype)


def fake_quantize_reference(
    weight: Tensor,
    lo: Tensor,
    hi: Tensor,
    upper: Tensor,
    lower: Tensor,
    grid: Grid,
    out_dtype: torch.dtype | None = None,
) -> Tensor:
    """``fake_quantize`` as plain differentiable torch: the specification. Same arguments and result."""
    levels = grid.levels
    xmin, xmax = clip_range(lo.unsqueeze(-1), hi.unsqueeze(-1), upper.unsqueeze(-1), lower.unsqueeze(-1))  # [o, G, 1]
    s = 2 * torch.maximum(xmax, -xmin) / levels if grid.symmetric else (xmax - xmin) / levels
    s = s.clamp(min=torch.finfo(s.dtype).tiny)
    z = torch.full_like(s, 2 ** (grid.bits - 1)) if grid.symmetric else (-xmin / s).round().clamp(0, levels).detach()
    steps = weight.unflatten(-1, (lo.shape[-1], -1)) / s  # [o, G, g]
    rounded = steps + (steps.round() - steps).detach()
    codes = (rounded + z).clamp(0, levels)
    return ((codes - z) * s).flatten(-2).to(out_dtype or weight.dtype)


@torch.library.custom_op("omniq::fake_quantize", mutates_args=())
def _fake_quantize(
    weight: Tensor,
    lo: Tensor,
    hi: Tensor,
    upper: Tensor,
    lower: Tensor,
    bits: int,
    symmetric: bool,
    out_dtype: torch.dtype,
) -> Tensor:
    if _fused(weight):
        from omniq.kernels.fake_quant_triton import forward

        return forward(weight, lo, hi, upper, lower, bits, symmetric, out_dtype)
    s, least, most = _bounds(weight, lo, hi, upper, lower, bits, symmetric)
    out = torch.empty_like(weight, dtype=out_dtype, memory_format=torch.contiguous_format)
    groups = (lo.shape[-1], -1)
    for rows in _chunks(weight):
        steps = weight[rows].unflatten(-1, groups) / s[rows]  # [rows, G, g]
        steps.round_().clamp_(least[rows], most[rows])
        torch.mul(steps, s[rows], out=out[rows].unflatten(-1, groups))
    return out


@_fake_quantize.register_fake
def _(
    weight: Tensor,
    lo: Tensor,
    hi: Tensor,
    upper: Tensor,
    lower: Tensor,
    bits: int,
    symmetric: bool,
    out_dtype: torch.dtype,
) -> Tensor:
    return torch.empty_like(weight, dtype=out_dtype, memory_format=torch.contiguous_format)


@torch.library.custom_op("omniq::fake_quantize_backward", mutates_args=())
def _fake_quantize_backward(
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
    """Gradients of weight, lo, hi, upper, lower; the first three are empty unless the weight is ``moving``."""
    if _fused(weight):
        from omniq.kernels.fake_quant_triton import backward

        return backward(grad, weight, lo, hi, upper, lower, bits, symmetric, moving)
    s, least, most = _bounds(weight, lo, hi, upper, lower, bits, symmetric)
    d_weight = torch.empty_like(weight if moving else weight[:0], memory_format=torch.contiguous_format)
    d_scale = torch.empty_like(s)
    groups = (lo.shape[-1], -1)
    for rows in _chunks(weight):
        G = grad[rows].unflatten(-1, groups)  # [rows, G, g]
        steps = weight[rows].unflatten(-1, groups) / s[rows]
        inside = steps.round()
        codes = inside.clamp(least[rows], most[rows])  # q - z
        inside.eq_(codes)  # 1 or 0, in floating point: several times faster than masks
        residual = codes.addcmul_(steps, inside, value=-1)
        torch.sum(residual.mul_(G), dim=-1, keepdim=True, out=d_scale[rows])
        if moving:
            torch.mul(G, inside, out=d_weight[rows].unflatten(-1, groups))
    return d_weight, *_range_gradients(d_scale.squeeze(-1), lo, hi, upper, lower, bits, symmetric, moving)


@_fake_quantize_backward.register_fake
def _(
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
    constants = (weight, lo, hi) if moving else (weight[:0], lo[:0], hi[:0])
    made = [torch.empty_like(like, memory_format=torch.contiguous_format) for like in (*constants, upper, lower)]
    return made[0], made[1], made[2], made[3], made[4]


def _setup_context(ctx: torch.autograd.function.FunctionCtx, inputs: tuple, output: Tensor) -> None:
    *tensors, ctx.bits, ctx.symmetric, _ = inputs
    ctx.save_for_backward(*tensors)


def _backward(ctx: torch.autograd.function.FunctionCtx, grad: Tensor) -> tuple[Tensor | None, ...]:
    moving = any(ctx.needs_input_grad[:3])
    grads = _fake_quantize_backward(grad, *ctx.saved_tensors, ctx.bits, ctx.symmetric, moving)
    needed = (each if need else None for each, need in zip(grads, ctx.needs_input_grad[:5], strict=True))
    return *needed, None, None, None


_fake_quantize.register_autograd(_backward, setup_context=_setup_context)


def _bounds(
    weight: Tensor, lo: Tensor, hi: Tensor, upper: Tensor, lower: Tensor, bits: int, symmetric: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Scale, ``-z`` and ``L - z``, each ``[o, G, 1]``: clamping ``round(w / s)`` between the two is exact."""
    levels = 2**bits - 1
    dtype = torch.promote_types(weight.dtype, torch.float32)
    xmin, xmax = clip_range(lo.to(dtype), hi.to(dtype), upper.to(dtype), lower.to(dtype))
    s = 2 * torch.maximum(xmax, -xmin) / levels if symmetric else (xmax - xmin) / levels
    s = s.clamp(min=torch.finfo(dtype).tiny).unsqueeze(-1)
    z = torch.full_like(s, 2 ** (bits - 1)) if symmetric else (-xmin.unsqueeze(-1) / s).round().clamp(0, levels)
    return s, -z, levels - z


def _range_gradients(
    d_scale: Tensor, lo: Tensor, hi: Tensor, upper: Tensor, lower: Tensor, bits: int, symmetric: bool, moving: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """From the gradient of the scale to those of lo, hi, upper, lower, ``[o, G]`` each, in their own dtypes."""
    levels, dtype = 2**bits - 1, d_scale.dtype
    keep_hi, keep_lo = upper.to(dtype).sigmoid(), lower.to(dtype).sigmoid()
    xmin, xmax = keep_lo * lo.to(dtype), keep_hi * hi.to(dtype)
    if symmetric:
        # The side that sets the scale gets everything; 0.5 is its share in a tie.
        to_hi = torch.heaviside(xmax + xmin, torch.tensor(0.5, dtype=dtype, device=xmax.device))
        s, to_lo = 2 * torch.maximum(xmax, -xmin) / levels, 2 * (1 - to_hi)
        to_hi = 2 * to_hi
    else:
        s, to_lo, to_hi = (xmax - xmin) / levels, 1, 1
    d_scale = torch.where(s < torch.finfo(dtype).tiny, 0, d_scale) / levels
    d_max, d_min = to_hi * d_scale, -to_lo * d_scale
    d_upper, d_lower = d_max * xmax * (1 - keep_hi), d_min * xmin * (1 - keep_lo)
    d_lo, d_hi = (d_min * keep_lo, d_max * keep_hi) if moving else (d_min[:0], d_max[:0])
    return d_lo.to(lo.dtype), d_hi.to(hi.dtype), d_upper.to(upper.dtype), d_lower.to(lower.dtype)


def _chunks(weight: Tensor) -> Iterator[slice]:
    """Slices of rows whose scratch stays in cache."""
    size = _CHUNK if weight.device.type == "cpu" else _CHUNK_DEVICE
    step = max(1, size // weight.shape[-1])
    return (slice(start, start + step) for start in range(0, weight.shape[0], step))


def _fused(weight: Tensor) -> bool:
    """Whether the Triton kernels take this weight."""
    return weight.device.type == "cuda" and weight.dtype != torch.float64 and _has_triton()


@functools.cache
def _has_triton() -> bool:
    if importlib.util.find_spec("triton") is not None:
        return True
    warnings.warn("triton is not installed: fake quantization on CUDA runs unfused, several times slower", stacklevel=2)
    return False
