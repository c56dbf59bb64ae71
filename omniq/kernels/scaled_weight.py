# SPDX-License-Identifier: Apache-2.0
"""A weight with factors on its rows and columns that are not multiplied yet.

A transform of scales changes a linear to ``diag(rows) W diag(columns)``. The three tensors are kept apart: the matrix
stays the block's frozen one, in half precision, and the fake-quantization operator multiplies in registers. So a step
under a transform makes no float32 copy of the weights either. ``tensor`` multiplies where the matrix is needed.

Shapes: ``o`` output features, ``i`` input features.
"""

from dataclasses import dataclass, replace

import torch
from torch import Tensor


@dataclass(frozen=True)
class ScaledWeight:
    """``diag(rows) W diag(columns)``, differentiable in all three tensors.

    Args:
        weight: ``[o, i]``.
        rows: factor of each output, ``[o]``; None for ones.
        columns: factor of each input, ``[i]``; None for ones.
    """

    weight: Tensor
    rows: Tensor | None = None
    columns: Tensor | None = None

    def times_rows(self, factor: Tensor) -> "ScaledWeight":
        """``diag(factor)`` times this weight; ``factor`` is ``[o]``."""
        return replace(self, rows=factor if self.rows is None else self.rows * factor)

    def times_columns(self, factor: Tensor) -> "ScaledWeight":
        """This weight times ``diag(factor)``; ``factor`` is ``[i]``."""
        return replace(self, columns=factor if self.columns is None else self.columns * factor)

    def product(self, vector: Tensor) -> Tensor:
        """The matrix times a vector ``[i]``, in the dtype of the vector even under autocast."""
        with torch.autocast(self.weight.device.type, enabled=False):
            through = vector if self.columns is None else self.columns * vector
            out = self.weight.to(through.dtype) @ through
        return out if self.rows is None else self.rows * out

    def tensor(self) -> Tensor:
        """The matrix, ``[o, i]``, promoted to the dtype of its factors."""
        out = self.weight if self.columns is None else self.weight * self.columns
        return out if self.rows is None else out * self.rows.unsqueeze(-1)


def materialize(weight: Tensor | ScaledWeight) -> Tensor:
    """The matrix of a weight with or without factors, ``[o, i]``."""
    return weight.tensor() if isinstance(weight, ScaledWeight) else weight
