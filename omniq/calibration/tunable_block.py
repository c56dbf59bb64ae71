# SPDX-License-Identifier: Apache-2.0
r"""A finished block whose scales, norms and biases can still be learned. Its codes are fixed, or learned as well.

The parameters are relative changes ``d``, all zero at the start. The block computes with the values that are exported:

    s' = store(s (1 + d_s))                  scales of a linear, rounded to their storage dtype
    q' = clamp(round(q + d_q), 0, L)         codes, if they are learned
    W  = (q' - z) s'                         weight; zero points are fixed
    n' = store(n + d_n rms(n))               norms and biases; one that is zero everywhere stays zero

``store`` and ``round`` are straight-through: their derivative is one. The gradients of a weight ``G = dLoss/dW`` are

    d_s: s sum over the group of G (q' - z)        d_q: G s' where q + d_q is within [0, L], else 0

Only codes (one byte a weight) are kept for the backward pass, not the weights.

Shapes: ``o``/``i`` output and input features, ``G`` groups, ``n`` samples, ``t`` tokens, ``h`` hidden size.
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from omniq.blocks.weights import load_quantized_weights
from omniq.grid.affine import Grid
from omniq.storage.block_result import BlockResult, QuantizedLinear


class TunableBlock:
    """A block with its result, as a function of hidden states and relative changes.

    Args:
        block: the Hugging Face block on the device of the computation. Its quantized weights are released: ``forward``
            passes them in.
        result: the finished block.
        codes: learn the codes too.
        dtype: the export dtype, to which norms and biases are rounded.
    """

    def __init__(self, block: nn.Module, result: BlockResult, codes: bool, dtype: torch.dtype) -> None:
        load_quantized_weights(block, result)
        self.block, self.device = block, next(block.parameters()).device
        self.linears = {name: _on_device(linear, self.device) for name, linear in result.linears.items()}
        self.shapes = change_shapes(result, codes)
        self.dtype = dtype
        self.tensors = {n: v.to(self.device, dtype) for n, v in result.tensors.items() if n in self.shapes}
        for name in self.linears:
            weight = block.get_parameter(f"{name}.weight")
            weight.data = weight.data.new_empty(0)

    def forward(self, hidden: Tensor, kwargs: Mapping[str, Any], changes: Mapping[str, Tensor]) -> Tensor:
        """Run the block, ``[n, t, h]`` to ``[n, t, h]``; differentiable in ``hidden`` and in ``changes``.

        Args:
            hidden: the input of the block.
            kwargs: the other arguments of the block's forward.
            changes: relative changes by key, of the shapes ``shapes``.
        """
        kind = hidden.device.type
        dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else hidden.dtype
        values = {name: self.tensor(name, changes).to(hidden.dtype) for name in self.tensors}
        values |= {f"{name}.weight": self.weight(name, changes, dtype) for name in self.linears}
        output = functional_call(self.block, values, (hidden,), dict(kwargs))
        return output[0] if isinstance(output, tuple) else output

    def weight(self, name: str, changes: Mapping[str, Tensor], dtype: torch.dtype) -> Tensor:
        """Return the deployed weight of a linear, ``[o, i]``."""
        linear = self.linears[name]
        scale = self.scale(name, changes)
        weight = _Dequantize.apply(linear.codes, scale, linear.zero_point, changes.get(f"{name}:codes"), linear.grid)
        if linear.outliers is not None:
            weight = weight + linear.outliers.dense(weight.shape[1], device=self.device)
        return weight.to(dtype)

    def scale(self, name: str, changes: Mapping[str, Tensor]) -> Tensor:
        """Return the deployed scales of a linear, float32 ``[o, G]``, exact in the storage dtype."""
        linear = self.linears[name]
        scale = linear.scale.float() * (1 + changes[f"{name}:scale"])
        return _straight_through(scale, linear.grid.store(scale.detach()))

    def tensor(self, name: str, changes: Mapping[str, Tensor]) -> Tensor:
        """Return a deployed norm or bias, float32 and exact in the export dtype."""
        start = self.tensors[name].float()
        value = start + changes[name] * start.square().mean().sqrt()
        return _straight_through(value, value.detach().to(self.dtype).float())

    @torch.no_grad()
    def changed(self, result: BlockResult, changes: Mapping[str, Tensor]) -> BlockResult:
        """Return the result of the block with the deployed values."""
        linears = {}
        for name, linear in result.linears.items():
            codes, offset = linear.codes, changes.get(f"{name}:codes")
            if offset is not None:
                codes = _deployed_codes(codes.to(offset.device), offset, linear.grid.max_code)
            scale = self.scale(name, changes).to("cpu", linear.scale.dtype)
            linears[name] = replace(linear, codes=codes.to("cpu", torch.uint8), scale=scale)
        tensors = {name: self.tensor(name, changes).to("cpu", self.dtype) for name in self.tensors}
        return replace(result, linears=linears, tensors={**result.tensors, **tensors})


def change_shapes(result: BlockResult, codes: bool) -> dict[str, tuple[int, ...]]:
    """Return the shape of every relative change of a block, by key: ``q_proj:scale``, ``input_layernorm.weight``.

    Args:
        result: the finished block.
        codes: whether codes are learned: ``q_proj:codes``.
    """
    shapes: dict[str, tuple[int, ...]] = {}
    for name, linear in result.linears.items():
        shapes[f"{name}:scale"] = tuple(linear.scale.shape)
        if codes:
            shapes[f"{name}:codes"] = tuple(linear.codes.shape)
    if result.linears:  # a block in floating point is the block of the full-precision model
        shapes |= {name: tuple(value.shape) for name, value in result.tensors.items() if is_tunable(value)}
    return shapes


def is_tunable(value: Tensor) -> bool:
    """Return whether a parameter that is not quantized is learned: norms and biases, which are vectors."""
    return value.dim() == 1 and value.is_floating_point()


def unflatten(flat: Tensor, shapes: Mapping[str, Sequence[int]]) -> dict[str, Tensor]:
    """Split a flat tensor into the tensors of given shapes, in order; one split, so that its backward is one copy."""
    sizes = [int(torch.Size(shape).numel()) for shape in shapes.values()]
    return {key: part.view(tuple(shape)) for (key, shape), part in zip(shapes.items(), flat.split(sizes), strict=True)}


class _Dequantize(torch.autograd.Function):
    """``(q' - z) s`` in float32, see the module docstring."""

    @staticmethod
    def forward(
        ctx: Any, codes: Tensor, scale: Tensor, zero_point: Tensor, offset: Tensor | None, grid: Grid
    ) -> Tensor:
        if offset is not None:
            wanted = codes.float() + offset
            codes = _deployed_codes(codes, offset, grid.max_code)
            inside = (wanted >= 0) & (wanted <= grid.max_code)
            ctx.save_for_backward(codes, scale, zero_point, inside)
        else:
            ctx.save_for_backward(codes, scale, zero_point)
        ctx.grid = grid
        return grid.dequantize(codes, scale, zero_point)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[None, Tensor, None, Tensor | None, None]:
        (gradient,) = grad_outputs
        codes, scale, zero_point, *inside = ctx.saved_tensors
        grid: Grid = ctx.grid
        unit = grid.split(codes.float()) - zero_point.unsqueeze(-1).float()  # [o, G, g]
        d_scale = (grid.split(gradient) * unit).sum(-1)
        d_offset = gradient * grid.expand(scale, gradient.shape[1]) * inside[0] if inside else None
        return None, d_scale, None, d_offset, None


def _deployed_codes(codes: Tensor, offset: Tensor, largest: int) -> Tensor:
    return (codes.float() + offset).round_().clamp_(0, largest).to(torch.uint8)


def _straight_through(value: Tensor, stored: Tensor) -> Tensor:
    return stored + (value - value.detach())  # exactly ``stored``


def _on_device(linear: QuantizedLinear, device: torch.device) -> QuantizedLinear:
    parts = {name: getattr(linear, name).to(device) for name in ("codes", "scale", "zero_point")}
    return replace(linear, **parts)
