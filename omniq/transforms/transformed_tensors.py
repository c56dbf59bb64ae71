# SPDX-License-Identifier: Apache-2.0
"""The tensors of a block while equivalences are applied to them.

Weights of linears are not multiplied at once. They collect factors of their rows and columns
(``omniq.kernels.scaled_weight``), so that training a transform makes no float32 copy of a frozen matrix. All other
tensors (norms, biases) are small and are computed immediately.

Shapes: ``o`` output features, ``i`` input features.
"""

from collections.abc import Collection, Mapping

from torch import Tensor

from omniq.kernels.scaled_weight import ScaledWeight
from omniq.transforms.heads import Heads
from omniq.transforms.linear_ref import LinearRef


class TransformedTensors:
    """The tensors of a block, to which equivalences apply scales and shifts.

    Args:
        tensors: the tensors by name; not modified.
        linears: names of the linears whose weights collect factors.
        heads: the attention heads of the block.

    Attributes:
        plain: every tensor that is not the weight of one of these linears, by name.
        weights: weights of these linears, by the name of the linear.
    """

    def __init__(self, tensors: Mapping[str, Tensor], linears: Collection[str], heads: Heads) -> None:
        self.heads = heads
        self.plain = dict(tensors)
        self.weights = {name: ScaledWeight(self.plain.pop(f"{name}.weight")) for name in dict.fromkeys(linears)}

    def features(self, linear: LinearRef) -> int:
        """Number of output features of a linear."""
        factored = {f"{name}.weight": weight.weight for name, weight in self.weights.items()}
        return linear.features(self.plain | factored)

    def divide_norm(self, name: str, scale: Tensor, shift: Tensor | None = None, offset: float = 0.0) -> None:
        """Subtract ``shift`` from the output of a norm, then divide it by ``scale``.

        Args:
            name: name of the norm.
            scale, shift: values for each channel.
            offset: the norm multiplies by ``offset + weight``; 1 in Gemma, 0 in most families.
        """
        weight = self.plain[f"{name}.weight"]
        self.plain[f"{name}.weight"] = (weight + offset) / scale - offset if offset else weight / scale
        self._divide_bias(name, scale, shift)

    def divide(self, linear: LinearRef, scale: Tensor, shift: Tensor | None = None) -> None:
        """Subtract ``shift`` from the outputs of a linear, then divide them by ``scale``; both are ``[rows]``."""
        weight = self.weights[linear.name]
        outputs = weight.weight.shape[0]
        self.weights[linear.name] = weight.times_rows(linear.spread(1 / scale, outputs, fill=1.0))
        shift = None if shift is None else linear.spread(shift, outputs, fill=0.0)
        self._divide_bias(linear.name, linear.spread(scale, outputs, fill=1.0), shift)

    def multiply_inputs(self, name: str, scale: Tensor, shift: Tensor | None = None) -> None:
        """Compensate for inputs of a linear that lost ``shift`` and were divided by ``scale``; both are ``[i]``."""
        if shift is not None:
            lost = self.weights[name].product(shift)
            self.plain[f"{name}.bias"] = self.plain[f"{name}.bias"] + lost if f"{name}.bias" in self.plain else lost
        self.weights[name] = self.weights[name].times_columns(scale)

    def _divide_bias(self, name: str, scale: Tensor, shift: Tensor | None) -> None:
        bias = self.plain.get(f"{name}.bias")
        if shift is not None:
            bias = -shift if bias is None else bias - shift
        if bias is not None:
            self.plain[f"{name}.bias"] = bias / scale

    def factored(self) -> dict[str, Tensor | ScaledWeight]:
        """Every tensor by name; weights of linears with separate factors."""
        return self.plain | {f"{name}.weight": weight for name, weight in self.weights.items()}
