# SPDX-License-Identifier: Apache-2.0
"""Up to down: divide rows of ``Wu`` and ``bu`` by ``s``; ``Wd diag(s^power)``.

Exact if the function between them is homogeneous in the divided output. The product of a gated MLP,
``down(act(gate) * up)``, and ReLU have ``power`` 1, since ``relu(x / s) = relu(x) / s``; squared ReLU has ``power`` 2.
OmniQuant's paper omits these scales as unstable after the non-linearity.
"""

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from omniq.transforms.equivalence import Equivalence
from omniq.transforms.linear_ref import Linear, LinearRef
from omniq.transforms.transformed_tensors import TransformedTensors


@dataclass(frozen=True)
class UpToDown(Equivalence):
    """Rows of the up projection and columns of the down projection.

    Args:
        up: the projection whose output is divided.
        down: the linear that reads the result of the MLP's non-linearity.
        power: the input of ``down`` is divided by the scale to this power.
    """

    kind: ClassVar[str] = "up_down"
    up: Linear
    down: str
    power: float = 1.0

    @property
    def divided(self) -> LinearRef:
        return LinearRef.of(self.up)

    @property
    def readers(self) -> tuple[str, ...]:
        return (self.down,)

    @property
    def factored(self) -> tuple[str, ...]:
        return self.modules

    def apply(self, tensors: TransformedTensors, scale: Tensor, shift: Tensor | None) -> None:
        tensors.divide(self.divided, scale)
        tensors.multiply_inputs(self.down, scale if self.power == 1 else scale**self.power)
