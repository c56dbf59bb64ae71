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
tie, as ``torch.maximum``).

While no transform moves the weights, ``w``, ``lo`` and ``hi`` are constants, the range is computed once, and only the
logits get a gradient. Weights that a transform moves have an operator of their own
(``omniq.kernels.fake_quant_moving``).

Three versions of one function: ``fake_quantize_reference`` is the text above in differentiable torch, the thing to
read; the operator ``omniq::fake_quantize`` has the analytic gradient, saves nothing but its inputs, and runs in chunks
that stay in cache (``omniq.kernels.fake_quant_torch``) or, on CUDA, as one fused Triton kernel each way
(``omniq.kernels.fake_quant_triton``). Arithmetic is float32 whatever the weight's dtype (float64 for float64). The
operator is opaque to torch.compile (no graph break) and safe inside CUDA graphs.

Differences from the published code (arXiv 2308.13137, section 3.2): ranges include zero, so ``0 <= z <= L`` always;
the least scale is the smallest normal number, not 1e-5; a symmetric grid is the one of ``Grid``; nothing of the form
``w / s^2`` is ever computed, which is what overflowed there in float16 at 8 bits. As there, training does not round
the scale to its storage dtype; ``Grid.fit`` does so when the learned clipping is fused.

Shapes: ``o`` output features, ``i`` input features, ``G`` groups in a row, ``g`` group size.
"""

from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from omniq.grid.affine import Grid
from omniq.kernels import fake_quant_torch
from omniq.kernels.fake_quant_torch import clip_range
from omniq.kernels.fused import is_fused

__all__ = ["clip_range", "fake_quantize", "fake_quantize_reference"]


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
    lo: Tensor | None,
    hi: Tensor | None,
    upper: Tensor,
    lower: Tensor,
    grid: Grid,
    out_dtype: torch.dtype | None = None,
) -> Tensor:
    """``fake_quantize`` as plain differentiable torch: the specification.

    Same arguments and result; without ``lo`` and ``hi`` the range is the weight's own, gradient included.
    """
    max_code = grid.max_code
    if lo is None or hi is None:
        lo, hi = grid.range(weight)
    xmin, xmax = clip_range(lo.unsqueeze(-1), hi.unsqueeze(-1), upper.unsqueeze(-1), lower.unsqueeze(-1))  # [o, G, 1]
    s = 2 * torch.maximum(xmax, -xmin) / max_code if grid.symmetric else (xmax - xmin) / max_code
    s = s.clamp(min=torch.finfo(s.dtype).tiny)
    z = torch.full_like(s, 2 ** (grid.bits - 1)) if grid.symmetric else (-xmin / s).round().clamp(0, max_code).detach()
    steps = weight.unflatten(-1, (lo.shape[-1], -1)) / s  # [o, G, g]
    rounded = steps + (steps.round() - steps).detach()
    codes = (rounded + z).clamp(0, max_code)
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
    return _version(weight).forward(weight, lo, hi, upper, lower, bits, symmetric, out_dtype)


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
    """Gradients of weight, lo, hi, upper, lower; the first three empty without ``moving``."""
    return _version(weight).backward(grad, weight, lo, hi, upper, lower, bits, symmetric, moving)


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
    return fake_quant_torch.room_for_gradients(weight, lo, hi, upper, lower, moving)


def _setup_context(ctx: Any, inputs: tuple, output: Tensor) -> None:
    weight, lo, hi, upper, lower, ctx.bits, ctx.symmetric, _ = inputs
    ctx.save_for_backward(weight, lo, hi, upper, lower)


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    moving = any(ctx.needs_input_grad[:3])
    grads = _fake_quantize_backward(grad, *ctx.saved_tensors, ctx.bits, ctx.symmetric, moving)
    needed = (each if need else None for each, need in zip(grads, ctx.needs_input_grad[:5], strict=True))
    return *needed, None, None, None


_fake_quantize.register_autograd(_backward, setup_context=_setup_context)


def _version(weight: Tensor) -> ModuleType:
    """The module whose ``forward`` and ``backward`` take this weight."""
    if is_fused(weight):
        from omniq.kernels import fake_quant_triton

        return fake_quant_triton
    return fake_quant_torch
