# SPDX-License-Identifier: Apache-2.0
"""The result of every solver: a layer as codes on a grid and, beside them, a sparse part."""

from typing import NamedTuple

from torch import Tensor


class LayerSolution(NamedTuple):
    """A quantized layer, ``W^ = (q - z) s + H``.

    Args:
        codes: q, uint8 ``[o, i]``.
        scale, zero_point: s and z, ``[o, G]``.
        sparse: H, ``[o, i]``, zero outside its support; None if there is none.

    Shapes: ``o`` output features, ``i`` input features, ``G`` groups.
    """

    codes: Tensor
    scale: Tensor
    zero_point: Tensor
    sparse: Tensor | None

    def values(self, group_index: Tensor | None = None) -> Tensor:
        """W^, ``[o, i]``, in the dtype of the scale.

        Args:
            group_index: group of each column, int64 ``[i]``; by default equal runs of neighbours.
        """
        codes = self.codes.to(self.scale.dtype)
        if group_index is None:
            groups = codes.unflatten(1, (self.scale.shape[1], -1))  # [o, G, g]
            dense = ((groups - self.zero_point.unsqueeze(-1)) * self.scale.unsqueeze(-1)).flatten(1)
        else:
            dense = (codes - self.zero_point[:, group_index]) * self.scale[:, group_index]
        return dense if self.sparse is None else dense + self.sparse
