# SPDX-License-Identifier: Apache-2.0
"""A weight with factors on its rows and columns that nobody has multiplied yet.

All that a transform of scales does to a linear is ``diag(rows) W diag(columns)``. Kept as three tensors, the matrix
stays the frozen one of the block, in half precision, and what fake-quantizes it multiplies in registers: under a
transform, too, no step makes a float32 copy of the weights. Whoever needs the matrix asks for ``tensor``.

Shapes: ``o`` output features, ``i`` input features.
"""

from dataclasses import dataclass, replace

import torch
from torch import Tensor


@dataclass(frozen=True)
class ScaledWeight:
    """``diag(rows) W diag(columns)``; differentiable in whichever part has a gradient.

    Args:
        weight: ``[o, i]``.
        rows: factor of each output, ``[o]``; None for ones.
        columns: factor of each input, ``[i]``; None for ones.
    """

    weight: Tensor
    rows: Tensor | None = None
    columns: Tensor | None = None

    def times_rows(self, factor: Tensor) -> "ScaledWeight":
        """Multiplied from the left by the diagonal of ``factor``, ``[o]``."""
        return replace(self, rows=factor if self.rows is None else self.rows * factor)

    def times_columns(self, factor: Tensor) -> "ScaledWeight":
        """Multiplied from the right by the diagonal of ``factor``, ``[i]``."""
        return replace(self, columns=factor if self.columns is None else self.columns * factor)

    def product(self, vector: Tensor) -> Tensor:
        """The matrix times a vector ``[i]``, in the dtype of the vector, whatever autocast says."""
        with torch.autocast(self.weight.device.type, enabled=False):
            through = vector if self.columns is None else self.columns * vector
            out = self.weight.to(through.dtype) @ through
        return out if self.rows is None else self.rows * out

    def tensor(self) -> Tensor:
        """The matrix, ``[o, i]``, promoted to the dtype of its factors."""
        out = self.weight if self.columns is None else self.weight * self.columns
        return out if self.rows is None else out * self.rows.unsqueeze(-1)


def materialize(weight: Tensor | ScaledWeight) -> Tensor:
    """The matrix, whichever way it is given."""
    return weight.tensor() if isinstance(weight, ScaledWeight) else weight
