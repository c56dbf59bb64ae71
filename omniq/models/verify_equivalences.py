# SPDX-License-Identifier: Apache-2.0
"""Verify that an equivalence leaves the output of a real block unchanged.

A family declares its equivalences, and a wrong declaration causes no error by itself. For example, a norm of Gemma
multiplies by ``1 + w``; a scale that divides ``w`` changes the block, and codes and logits are then verified against
the changed block. Therefore each equivalence that a run uses is first applied with random scales and shifts to the real
block:

    error = || F(T(W), X) - F(W, X) || / || F(W, X) - X ||

The denominator is the contribution of the block to the residual stream, since a large residual would hide a wrong
transform. In float64, an exact equivalence has an error of about 1e-15; the wrong ones that were tried have 1e-3 and
more.

Many modules of transformers compute in float32 whatever the dtype of their input (RMSNorm, softmax). While a block is
verified in float64, these casts are redirected to float64.

Shapes: ``n`` samples, ``t`` tokens of a sample, ``h`` hidden size.
"""

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_map, tree_map_only

from omniq.models.layout import Layout
from omniq.transforms.equivalence import Equivalence
from omniq.transforms.transform import Transform

TOLERANCE = {torch.float64: 1e-5, torch.float32: 1e-4}
"""The largest error of an equivalence, by the dtype of the computation."""

_SPREAD = 0.5  # standard deviation of log scales and shifts: scales are mostly within 1/3 .. 3


class _Float64(TorchFunctionMode):
    """Redirects casts to float32 to float64."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Mapping[str, Any] | None = None) -> Any:
        func = Tensor.double if func is Tensor.float else func
        args, kwargs = tree_map(_widened, (tuple(args), dict(kwargs or {})))
        return func(*args, **kwargs)


def _widened(value: Any) -> Any:
    return torch.float64 if value is torch.float32 else value


class VerifiedBlock:
    """A block on which equivalences are verified.

    Args:
        block: the block with its weights; it is converted to ``dtype``.
        layout: the layout of the block.
        hidden: input of the block, ``[n, t, h]``.
        kwargs: the other arguments of its forward.
        dtype: dtype of the computation; float64 if the device supports it.
    """

    def __init__(
        self, block: nn.Module, layout: Layout, hidden: Tensor, kwargs: Mapping[str, Any], dtype: torch.dtype
    ) -> None:
        self.block, self.layout, self.dtype = block.to(dtype), layout, dtype
        self.hidden = hidden.to(dtype)
        self.kwargs = tree_map_only(Tensor, lambda x: x.to(dtype) if x.is_floating_point() else x, dict(kwargs))
        modules: Iterable[Any] = block.modules()
        for config in [module.config for module in modules if hasattr(module, "config")]:
            if config._attn_implementation not in ("eager", "sdpa"):  # others lack float64 and use masks of their own
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
        """Change of the output under a random instance of an equivalence, relative to the block's contribution.

        Returns:
            the error; 0 if the output of the block is not finite, which the run reports later.
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
        noise = 10 * torch.finfo(self.dtype).eps / TOLERANCE[self.dtype] * self.output.norm()  # do not count rounding
        return float(change / (self.output - self.hidden).norm().maximum(noise)) if change else 0.0
