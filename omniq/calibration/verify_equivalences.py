# SPDX-License-Identifier: Apache-2.0
"""Verify that an equivalence leaves the output of a real block unchanged.

A family declares equivalences, and a wrong declaration is silent: a norm of Gemma multiplies by ``1 + w``, and a scale
that divides ``w`` gives another block, against which codes and logits are then verified without an error. So each
equivalence that a run uses is first applied with random scales and shifts to the real block:

    error = || F(T(W), X) - F(W, X) || / || F(W, X) - X ||

The denominator is what the block adds to the residual stream, since a large residual would hide a wrong transform. In
float64 an exact equivalence has an error of about 1e-15 and the wrong ones that were tried have 1e-3 and more.

Many modules of transformers compute in float32 whatever their input is (RMSNorm, softmax). While a block is verified in
float64, those casts go to float64 instead.

Shapes: ``n`` samples, ``t`` tokens of a sample, ``h`` hidden size.
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_map, tree_map_only

from omniq.models.family import config_of
from omniq.models.layout import Layout
from omniq.transforms.equivalence import Equivalence
from omniq.transforms.transform import Transform

TOLERANCE = {torch.float64: 1e-5, torch.float32: 1e-4}
"""The largest error of an equivalence, by the dtype of the computation."""

_SPREAD = 0.5  # standard deviation of log scales and shifts: scales are mostly within 1/3 .. 3


class _Float64(TorchFunctionMode):
    """Casts to float32 become casts to float64."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Mapping[str, Any] | None = None) -> Any:
        func = Tensor.double if func is Tensor.float else func
        args, kwargs = tree_map(_widened, (tuple(args), dict(kwargs or {})))
        return func(*args, **kwargs)


def _widened(value: Any) -> Any:
    return torch.float64 if value is torch.float32 else value


class VerifiedBlock:
    """A block on which equivalences are tried.

    Args:
        block: with its weights; it is converted to the dtype.
        layout: of the block.
        hidden: its input, ``[n, t, h]``.
        kwargs: the other arguments of its forward.
        dtype: of the computation, float64 where the device has it.
    """

    def __init__(
        self, block: nn.Module, layout: Layout, hidden: Tensor, kwargs: Mapping[str, Any], dtype: torch.dtype
    ) -> None:
        self.block, self.layout, self.dtype = block.to(dtype), layout, dtype
        self.hidden = hidden.to(dtype)
        self.kwargs = tree_map_only(Tensor, lambda x: x.to(dtype) if x.is_floating_point() else x, dict(kwargs))
        config = config_of(block)
        if config._attn_implementation not in ("eager", "sdpa"):  # the others have no float64, and masks of their own
            config._attn_implementation = "sdpa"
            self.kwargs["attention_mask"] = None
        self.tensors = {name: value.detach() for name, value in self.block.named_parameters()}
        self.output = self.run(self.tensors)

    @torch.no_grad()
    def run(self, tensors: Mapping[str, Tensor]) -> Tensor:
        """The output of the block with these tensors, ``[n, t, h]``."""
        if self.dtype != torch.float64:
            return self._call(tensors)
        with _Float64():
            return self._call(tensors)

    def _call(self, tensors: Mapping[str, Tensor]) -> Tensor:
        output = functional_call(self.block, dict(tensors), (self.hidden,), self.kwargs)
        return output[0] if isinstance(output, tuple) else output

    @torch.no_grad()
    def error(self, equivalence: Equivalence) -> float:
        """By how much a random instance of an equivalence moves the output, relative to what the block adds.

        Returns:
            0 if the block has values that are not finite: the run reports those when it gets there.
        """
        if not self.output.isfinite().all():
            return 0.0
        layout = self.layout
        transform = Transform([equivalence], layout.heads, self.tensors, layout.can_bias)
        draw = torch.Generator().manual_seed(0)
        parameters = {
            name: _SPREAD * torch.randn(shape, generator=draw, dtype=torch.float64).to(self.hidden)
            for name, shape in transform.shapes.items()
        }
        change = (self.run(transform.apply(self.tensors, parameters)) - self.output).norm()
        noise = 10 * torch.finfo(self.dtype).eps / TOLERANCE[self.dtype] * self.output.norm()  # or rounding would count
        return float(change / (self.output - self.hidden).norm().maximum(noise)) if change else 0.0
