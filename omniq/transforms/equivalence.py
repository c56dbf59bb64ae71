# SPDX-License-Identifier: Apache-2.0
"""``Equivalence``: a change of a block's tensors by scales and shifts that leaves the output of the block unchanged.

    X W + b = ((X - d) / s) (diag(s) W) + (b + d W)             (OmniQuant, arXiv 2308.13137, equation 3)

``X`` is the input of a linear, in rows; ``s = exp(theta)`` is a positive scale and ``d`` a shift of each input channel.
The module that computes ``X`` shifts and divides its output; the linears that read it, the *readers*, compensate. Each
kind of equivalence is one file in ``omniq.transforms.equivalences``. ``omniq.transforms.transform`` applies all
equivalences of a block.

Equivalences are exact, also beyond the published cases:

- Query heads that read the same KV head share its parameters: one scale and shift for each KV channel.
- Channels that rotary embedding turns as a pair share one scale (``omniq.transforms.heads``).
- Norms of queries and keys would undo a scale of the projection, so the scale goes into their weight instead.
- A shift needs a bias in every module that it touches. ``Transform`` drops the shift if a bias cannot be stored.

Shapes: ``i`` input features, ``c`` parameters of an equivalence, ``n`` input features that share one parameter.
"""

from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import ClassVar

import torch
from torch import Tensor

from omniq.transforms.heads import Heads
from omniq.transforms.initial import ChannelRanges, smooth_scale
from omniq.transforms.linear_ref import LinearRef
from omniq.transforms.transformed_tensors import TransformedTensors


class Equivalence(ABC):
    """One equivalence of one block; subclasses are frozen dataclasses that name the modules.

    Attributes:
        kind: the name of the kind in YAML.
    """

    kind: ClassVar[str]

    @property
    def shift(self) -> bool:
        """True if a shift also leaves the output of the block unchanged."""
        return False

    @property
    def power(self) -> float:
        """Exponent: the inputs of the readers are divided by the scale to this power."""
        return 1.0

    @property
    @abstractmethod
    def divided(self) -> LinearRef:
        """The module whose output is divided; its key names the parameters."""

    @property
    @abstractmethod
    def readers(self) -> tuple[str, ...]:
        """The linears that read the divided output; their columns are multiplied. They share one input."""

    @property
    def modules(self) -> tuple[str, ...]:
        """Names of all modules whose outputs or inputs change, the divided one first."""
        return (self.divided.name, *self.readers)

    @property
    @abstractmethod
    def factored(self) -> tuple[str, ...]:
        """Names of the linears whose rows or columns are multiplied by factors."""

    def shapes(self, tensors: Mapping[str, Tensor], heads: Heads) -> dict[str, tuple[int, ...]]:
        """Shapes of the parameters: ``log_scale`` and, if the equivalence has a shift, ``shift``.

        Args:
            tensors: the parameters of the block by name.
            heads: the attention heads of the block.
        """
        shape = (self.divided.features(tensors),)
        return {"log_scale": shape, "shift": shape} if self.shift else {"log_scale": shape}

    @abstractmethod
    def apply(self, tensors: TransformedTensors, scale: Tensor, shift: Tensor | None) -> None:
        """Rewrite the tensors; differentiable in ``scale`` and ``shift``, which have the shapes of ``shapes``."""

    def to_inputs(self, values: Tensor, heads: Heads) -> Tensor:
        """Expand parameters over the input features of the readers, ``[c] -> [i]``."""
        return values

    def by_parameter(self, values: Tensor, heads: Heads) -> Tensor:
        """Gather values of the input features of the readers by their parameter, ``[i] -> [c, n]``."""
        return values.unsqueeze(1)

    def initial(
        self, tensors: Mapping[str, Tensor], ranges: ChannelRanges, heads: Heads, alpha: float | None, shift: bool
    ) -> dict[str, Tensor]:
        """Initial values of the parameters (``omniq.transforms.initial``); missing parameters start at zero.

        Args:
            tensors: the parameters of the block by name.
            ranges: ranges of the inputs of linears; without the range of any reader, the result is empty.
            heads: the attention heads of the block.
            alpha: migration strength: the fraction of the activations' size to move into the weights, 0 to 1; None
                to start scales at one.
            shift: start the shift at the middle of the range.
        """
        seen = next((name for name in self.readers if name in ranges.lo), None)
        if seen is None:
            return {}
        values = {}
        weight = torch.stack([tensors[f"{name}.weight"].abs().amax(0) for name in self.readers]).amax(0).float()  # [i]
        lo = self.by_parameter(ranges.lo[seen], heads).amin(1)
        hi = self.by_parameter(ranges.hi[seen], heads).amax(1)
        middle = torch.zeros_like(lo)
        if shift:
            middle = values["shift"] = (lo + hi) / 2
        if alpha is not None:
            size = torch.maximum(hi - middle, middle - lo)
            scale = smooth_scale(size, self.by_parameter(weight, heads).amax(1), alpha)
            values["log_scale"] = scale.log() / self.power
        return values

    def __str__(self) -> str:
        return f"{self.kind} of {', '.join(dict.fromkeys(map(str, (self.divided, *self.modules[1:]))))}"
