# SPDX-License-Identifier: Apache-2.0
"""Norm to linears: ``norm.w / s``, ``norm.b = (norm.b - d) / s``; ``W diag(s)``, ``b + W d`` for every reader.

A norm that multiplies by ``1 + w`` (Gemma) has ``offset`` 1: ``w = (1 + w) / s - 1``.
"""

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from omniq.transforms.equivalence import Equivalence
from omniq.transforms.linear_ref import LinearRef
from omniq.transforms.transformed_tensors import TransformedTensors


@dataclass(frozen=True)
class NormToLinears(Equivalence):
    """A norm whose output only these linears read.

    Args:
        norm: an RMSNorm or LayerNorm with a weight.
        linears: all linears that read the norm.
        offset: the norm multiplies by ``offset + weight``.
        shift: True if a shift is exact, provided that norm and readers can store a bias.
    """

    kind: ClassVar[str] = "norm"
    norm: str
    linears: tuple[str, ...]
    offset: float = 0.0
    shift: bool = True

    @property
    def divided(self) -> LinearRef:
        return LinearRef(self.norm)

    @property
    def readers(self) -> tuple[str, ...]:
        return self.linears

    @property
    def factored(self) -> tuple[str, ...]:
        return self.linears

    def apply(self, tensors: TransformedTensors, scale: Tensor, shift: Tensor | None) -> None:
        tensors.divide_norm(self.norm, scale, shift, self.offset)
        for name in self.linears:
            tensors.multiply_inputs(name, scale, shift)
