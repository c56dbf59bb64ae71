# SPDX-License-Identifier: Apache-2.0
"""Fake quantization of a weight that a transform moves: learned clipping of ``diag(r) W diag(c)``.

The arithmetic is that of ``omniq.kernels.fake_quant``, with ``w' = (w_ij c_j) r_i`` in place of ``w`` and the range of
each group taken from ``w'`` in every call. With ``d w' = in G`` and the share of ``d lo`` and ``d hi`` added to the
weights at the extremes (ties sharing evenly, what autograd does with ``Grid.range``):

    d r_i = sum_j d w'_ij w'_ij / r_i,    d c_j = sum_i d w'_ij w'_ij / c_j,    d w_ij = d w'_ij r_i c_j

``d r_i`` is had without the extremes: range, scale and result are all proportional to ``r_i``, so that it equals
``sum_j G_ij w^_ij / r_i`` (put ``g_s`` and the range in: ``in w' + ((q - z) - in w' / s) s = w^``).

Without ``r`` and ``c`` it is a weight on its own range. ``fake_quantize_reference`` of ``ScaledWeight.tensor()`` is the
specification; the operator ``omniq::fake_quantize_moving`` neither saves nor makes the moved matrix: in torch it exists
a chunk of rows at a time (``omniq.kernels.fake_quant_moving_torch``), on CUDA in registers
(``omniq.kernels.fake_quant_moving_triton``). Arithmetic is float32 (float64 for a weight in float64).

Shapes: ``o`` output features, ``i`` input features, ``G`` groups in a row, ``g`` group size.
"""

from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from omniq.grid.affine import Grid
from omniq.kernels import fake_quant_moving_torch
from omniq.kernels.fused import is_fused
from omniq.kernels.scaled_weight import ScaledWeight


def fake_quantize_moving(
    weight: ScaledWeight, upper: Tensor, lower: Tensor, grid: Grid, out_dtype: torch.dtype | None = None
) -> Tensor:
    """A moved weight as the clipped grid represents it, differentiable in every tensor argument.

    Args:
        weight: ``[o, i]`` with its factors, none of them zero.
        upper, lower: logits of the share of the largest and smallest weight of a group that is kept, ``[o, G]``.
        grid: bits and symmetry; the group size follows from the shapes.
        out_dtype: dtype of the result; that of ``weight.weight`` by default.

    Returns:
        ``[o, i]``.
    """
    matrix = weight.weight
    none = upper.new_empty(0)
    rows, columns = (none if factor is None else factor for factor in (weight.rows, weight.columns))
    return _fake_quantize(matrix, rows, columns, upper, lower, grid.bits, grid.symmetric, out_dtype or matrix.dtype)[0]


@torch.library.custom_op("omniq::fake_quantize_moving", mutates_args=())
def _fake_quantize(
    weight: Tensor,
    rows: Tensor,
    columns: Tensor,
    upper: Tensor,
    lower: Tensor,
    bits: int,
    symmetric: bool,
    out_dtype: torch.dtype,
) -> tuple[Tensor, Tensor, Tensor]:
    """The result and the range of each group; empty factors are ones."""
    return _version(weight, upper).forward(weight, rows, columns, upper, lower, bits, symmetric, out_dtype)


@_fake_quantize.register_fake
def _(
    weight: Tensor,
    rows: Tensor,
    columns: Tensor,
    upper: Tensor,
    lower: Tensor,
    bits: int,
    symmetric: bool,
    out_dtype: torch.dtype,
) -> tuple[Tensor, Tensor, Tensor]:
    lo, hi = fake_quant_moving_torch.room_for_range(weight, upper)
    return torch.empty_like(weight, dtype=out_dtype, memory_format=torch.contiguous_format), lo, hi


@torch.library.custom_op("omniq::fake_quantize_moving_backward", mutates_args=())
def _fake_quantize_backward(
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
    """Gradients of weight, rows, columns, upper, lower; the first empty without ``to_weight``."""
    version = _version(weight, upper)
    return version.backward(grad, weight, rows, columns, lo, hi, upper, lower, bits, symmetric, to_weight)


@_fake_quantize_backward.register_fake
def _(
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
    return fake_quant_moving_torch.room_for_gradients(weight, rows, columns, upper, lower, to_weight)


def _setup_context(ctx: Any, inputs: tuple, output: tuple[Tensor, Tensor, Tensor]) -> None:
    weight, rows, columns, upper, lower, ctx.bits, ctx.symmetric, _ = inputs
    ctx.mark_non_differentiable(*output[1:])
    ctx.save_for_backward(weight, rows, columns, *output[1:], upper, lower)


def _backward(ctx: Any, grad: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
    to_weight = ctx.needs_input_grad[0]
    grads = _fake_quantize_backward(grad, *ctx.saved_tensors, ctx.bits, ctx.symmetric, to_weight)
    needed = (each if need else None for each, need in zip(grads, ctx.needs_input_grad[:5], strict=True))
    return *needed, None, None, None


_fake_quantize.register_autograd(_backward, setup_context=_setup_context)


def _version(weight: Tensor, upper: Tensor) -> ModuleType:
    """The module whose ``forward`` and ``backward`` take this weight."""
    if is_fused(weight):
        from omniq.kernels import fake_quant_moving_triton

        if fake_quant_moving_triton.fits(weight, upper):
            return fake_quant_moving_triton
    return fake_quant_moving_torch
