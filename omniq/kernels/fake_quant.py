# SPDX-License-Identifier: Apache-2.0
"""Fake quantization of a weight with learnable clipping: the differentiable core of OmniQuant.

The weight is ``w = diag(r) W diag(c)``: ``W`` is frozen, and a transform gives the factors ``r`` and ``c`` (ones if
they are absent). For a group of weights with range ``lo <= 0 <= hi`` (zero included), ``b`` bits, ``L = 2^b - 1``
and two learned logits (OmniQuant, arXiv 2308.13137, learnable weight clipping):

    xmax = sigmoid(upper) hi,  xmin = sigmoid(lower) lo           the clipped range
    s = (xmax - xmin) / L      or  2 max(xmax, -xmin) / L         asymmetric or symmetric, at least ``tiny``
    z = round(-xmin / s)       or  2^(b-1)
    w^ = (clamp(round(w / s) + z, 0, L) - z) s

Gradient. Rounding of ``w / s`` is straight-through, and ``z`` has no gradient. With ``G = dLoss/dw^``, codes ``q``, and
``in`` true where ``0 <= round(w / s) + z <= L``:

    g_s = sum over the group of G ((q - z) - in w / s)            zero where s was raised to ``tiny``
    d upper = g_s hi / L sigmoid'(upper),  d lower = -g_s lo / L sigmoid'(lower)
    d hi    = g_s sigmoid(upper) / L,      d lo    = -g_s sigmoid(lower) / L
    d w     = in G

A symmetric grid has ``2 / L`` in place of ``1 / L``, and its gradient goes to the larger side only (half to each in a
tie, as ``torch.maximum`` does).

Range. While no transform changes the weights, ``lo`` and ``hi`` are constants: the caller computes them once and passes
them. Otherwise the operator computes the range of ``w`` in every call and adds ``d lo`` and ``d hi`` to ``d w`` at the
extreme weights, in equal shares among ties, as autograd does for ``Grid.range``. Then

    d r_i = sum_j d w_ij w_ij / r_i,    d c_j = sum_i d w_ij w_ij / c_j,    d W_ij = d w_ij r_i c_j

``d r_i`` does not need the extreme weights: range, scale and result are all proportional to ``r_i``, so it equals
``sum_j G_ij w^_ij / r_i`` (substitute ``g_s`` and the range: ``in w + ((q - z) - in w / s) s = w^``).

``fake_quantize_reference`` states the formula in differentiable torch and is the specification. The operator
``omniq::fake_quantize`` has the analytic gradient and saves only its inputs and the range. It never stores the scaled
matrix: ``omniq.kernels.fake_quant_torch`` forms it for a chunk of rows, ``omniq.kernels.fake_quant_triton`` in
registers, in one fused kernel for each direction. Arithmetic is float32 for every dtype of the weight except float64,
which has float64. The operator is opaque to torch.compile (no graph break) and safe inside CUDA graphs.

If the grid permits only some zero points, the clipped range is widened for them (``omniq.grid.affine``). The reference
computes such a grid, with several times the memory of the matrix.

Differences from the published code: ranges include zero, so ``0 <= z <= L`` always; the smallest scale is the smallest
normal number, not 1e-5; a symmetric grid is that of ``Grid``; no term of the form ``w / s^2`` is computed, which
overflows in the published code in float16 at 8 bits. As in the published code, training does not round the scale to its
storage dtype; ``Grid.fit`` does so when the learned clipping is fused.

Shapes: ``o`` output features, ``i`` input features, ``G`` groups in a row, ``g`` group size.
"""

from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from omniq.grid.affine import Grid
from omniq.kernels import fake_quant_torch
from omniq.kernels.fake_quant_torch import Operands, clip_range, empty_gradients, empty_like, empty_range
from omniq.kernels.fused import implementation, is_fused
from omniq.kernels.scaled_weight import ScaledWeight, materialize

__all__ = ["clip_range", "fake_quantize", "fake_quantize_reference"]

_OPERANDS = "Tensor weight, Tensor rows, Tensor columns, Tensor lo, Tensor hi, Tensor upper, Tensor lower"
_FORWARD = f"({_OPERANDS}, int bits, bool symmetric, ScalarType out_dtype) -> (Tensor, Tensor, Tensor)"
_BACKWARD = (
    f"(Tensor grad, {_OPERANDS}, int bits, bool symmetric, bool own_range, bool to_weight) -> "
    f"({', '.join(['Tensor'] * len(Operands._fields))})"
)


def fake_quantize(
    weight: Tensor | ScaledWeight,
    upper: Tensor,
    lower: Tensor,
    grid: Grid,
    bounds: tuple[Tensor, Tensor] | None = None,
    out_dtype: torch.dtype | None = None,
) -> Tensor:
    """Weights as the clipped grid represents them, differentiable in every tensor argument.

    Args:
        weight: ``[o, i]``, float16, bfloat16, float32 or float64; with factors, none of them zero, if a transform
            scales it.
        upper, lower: logits of the fractions of ``hi`` and ``lo`` that are kept, ``[o, G]``.
        grid: bits and symmetry; the group size follows from the shapes.
        bounds: range of each group, ``(lo, hi)`` of shape ``[o, G]`` with ``lo <= 0 <= hi``, as ``Grid.range`` returns
            it; by default the range of the weight, gradient included.
        out_dtype: dtype of the result; by default that of the weight without its factors.

    Returns:
        ``[o, i]``.

    Raises:
        ValueError: bounds are given for a weight with factors.
    """
    if not grid.symmetric and grid.zero_points != "any":
        return fake_quantize_reference(weight, upper, lower, grid, bounds, out_dtype)
    scaled = weight if isinstance(weight, ScaledWeight) else ScaledWeight(weight)
    if bounds is not None and not scaled.rows is scaled.columns is None:
        raise ValueError("bounds are given for a weight with factors: leave one of the two out")
    matrix, absent = scaled.weight, upper.new_empty(0)
    operands = (matrix, scaled.rows, scaled.columns, *(bounds or (None, None)), upper, lower)
    given = (absent if each is None else each for each in operands)
    return _fake_quantize(*given, grid.bits, grid.symmetric, out_dtype or matrix.dtype)[0]


def fake_quantize_reference(
    weight: Tensor | ScaledWeight,
    upper: Tensor,
    lower: Tensor,
    grid: Grid,
    bounds: tuple[Tensor, Tensor] | None = None,
    out_dtype: torch.dtype | None = None,
) -> Tensor:
    """``fake_quantize`` in plain differentiable torch: the specification. Same arguments and result."""
    w, max_code = materialize(weight), grid.max_code
    lo, hi = grid.range(w) if bounds is None else bounds
    clipped = clip_range(lo.unsqueeze(-1), hi.unsqueeze(-1), upper.unsqueeze(-1), lower.unsqueeze(-1))  # [o, G, 1]
    xmin, xmax = grid.widened(*clipped)
    s = 2 * torch.maximum(xmax, -xmin) / max_code if grid.symmetric else (xmax - xmin) / max_code
    s = s.clamp(min=torch.finfo(s.dtype).tiny)
    z = (
        torch.full_like(s, 2 ** (grid.bits - 1))
        if grid.symmetric
        else (-xmin / s).round().clamp(*grid.zero_range).detach()
    )
    steps = w.unflatten(-1, (lo.shape[-1], -1)) / s  # [o, G, g]
    rounded = steps + (steps.round() - steps).detach()
    codes = (rounded + z).clamp(0, max_code)
    matrix = weight.weight if isinstance(weight, ScaledWeight) else weight
    return ((codes - z) * s).flatten(-2).to(out_dtype or matrix.dtype)


def _forward(*arguments: Any) -> tuple[Tensor, Tensor, Tensor]:
    """The result and the computed range; arguments as ``_FORWARD`` declares them."""
    x = Operands(*arguments[:7])
    return _implementation(x, own_range=x.lo.numel() == 0).forward(x, *arguments[7:])


def _forward_fake(*arguments: Any) -> tuple[Tensor, Tensor, Tensor]:
    x, out_dtype = Operands(*arguments[:7]), arguments[-1]
    return empty_like(x.weight, out_dtype), *empty_range(x)


def _backward(grad: Tensor, *arguments: Any) -> tuple[Tensor, ...]:
    """Gradients of the operands; arguments as ``_BACKWARD`` declares them."""
    x, (_, _, own_range, _) = Operands(*arguments[:7]), arguments[7:]
    return tuple(_implementation(x, own_range).backward(grad, x, *arguments[7:]))


def _backward_fake(grad: Tensor, *arguments: Any) -> tuple[Tensor, ...]:
    return tuple(empty_gradients(Operands(*arguments[:7]), *arguments[9:]))


_fake_quantize = torch.library.custom_op("omniq::fake_quantize", _forward, mutates_args=(), schema=_FORWARD)
_fake_quantize_backward = torch.library.custom_op(
    "omniq::fake_quantize_backward", _backward, mutates_args=(), schema=_BACKWARD
)
_fake_quantize.register_fake(_forward_fake)
_fake_quantize_backward.register_fake(_backward_fake)


def _setup_context(ctx: Any, inputs: tuple, output: tuple[Tensor, Tensor, Tensor]) -> None:
    x, (ctx.bits, ctx.symmetric, _) = Operands(*inputs[:7]), inputs[7:]
    ctx.own_range = x.lo.numel() == 0
    ctx.mark_non_differentiable(*output[1:])
    ctx.save_for_backward(*(x._replace(lo=output[1], hi=output[2]) if ctx.own_range else x))


def _autograd(ctx: Any, grad: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
    needed = ctx.needs_input_grad[:7]
    to_weight = needed[0] or needed[3] or needed[4]
    grads = _fake_quantize_backward(grad, *ctx.saved_tensors, ctx.bits, ctx.symmetric, ctx.own_range, to_weight)
    return *(each if need else None for each, need in zip(grads, needed, strict=True)), None, None, None


_fake_quantize.register_autograd(_autograd, setup_context=_setup_context)


def _implementation(x: Operands, own_range: bool) -> ModuleType:
    """The module whose ``forward`` and ``backward`` run these operands."""
    kernels = implementation("fake_quant", is_fused(x.weight))
    return kernels if kernels.fits(x, own_range) else fake_quant_torch
