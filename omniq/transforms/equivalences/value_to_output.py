# SPDX-License-Identifier: Apache-2.0
"""Value to output: rows of ``Wv / s``, ``bv = (bv - d) / s``; ``Wo diag(s)``, ``bo + Wo d``.

The shift is exact because the weights of attention sum to one. It is not exact if attention has sinks or a gate. Query
heads that read the same KV head share its parameters.
"""

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from omniq.transforms.equivalence import Equivalence
from omniq.transforms.heads import Heads
from omniq.transforms.linear_ref import Linear, LinearRef
from omniq.transforms.transformed_tensors import TransformedTensors


@dataclass(frozen=True)
class ValueToOutput(Equivalence):
    """Rows of the value projection and columns of the output projection.

    Args:
        value: the projection, ``[K c]`` output features.
        output: the linear that reads the result of attention.
        shift: True if a shift is exact, provided that both linears can store a bias.
    """

    kind: ClassVar[str] = "value_output"
    value: Linear
    output: str
    shift: bool = True

    @property
    def divided(self) -> LinearRef:
        return LinearRef.of(self.value)

    @property
    def readers(self) -> tuple[str, ...]:
        return (self.output,)

    @property
    def factored(self) -> tuple[str, ...]:
        return self.modules

    def apply(self, tensors: TransformedTensors, scale: Tensor, shift: Tensor | None) -> None:
        tensors.divide(self.divided, scale, shift)
        shift = None if shift is None else self.to_inputs(shift, tensors.heads)
        tensors.multiply_inputs(self.output, self.to_inputs(scale, tensors.heads), shift)

    def to_inputs(self, values: Tensor, heads: Heads) -> Tensor:
        return heads.to_query(values)

    def by_parameter(self, values: Tensor, heads: Heads) -> Tensor:
        return heads.by_key(values)
