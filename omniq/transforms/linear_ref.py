# SPDX-License-Identifier: Apache-2.0
"""``LinearRef``: a linear of a block, or some of the output features of a fused linear.

Phi-3 computes queries, keys and values with one linear ``self_attn.qkv_proj``, rows ``[q | k | v]``. An equivalence
that scales the values names ``LinearRef("self_attn.qkv_proj", (start, stop))``. BLOOM orders the rows of its fused
linear by heads, ``[q k v | q k v | ...]``. There, ``every`` is the number of rows of one head, and ``rows`` is a range
inside it. A plain string names a whole linear.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise

from torch import Tensor
from torch.nn.functional import pad


@dataclass(frozen=True)
class LinearRef:
    """A linear, or some of its output features.

    Args:
        name: name of the linear inside the block.
        rows: index of the first output feature and of the one after the last; None for all.
        every: the range repeats after so many output features; None for one range.
    """

    name: str
    rows: tuple[int, int] | None = None
    every: int | None = None

    @classmethod
    def of(cls, linear: "str | LinearRef") -> "LinearRef":
        """The reference itself, or the whole linear of this name."""
        return cls(linear) if isinstance(linear, str) else linear

    @classmethod
    def split(cls, name: str, widths: Sequence[int], repeated: bool = False) -> "tuple[LinearRef, ...]":
        """Consecutive ranges of the output features of a fused linear.

        Args:
            name: name of the linear inside the block.
            widths: number of output features of each range.
            repeated: True if the ranges repeat until the last output feature, as in ``[q k v | q k v | ...]``.
        """
        ends = [0, *accumulate(widths)]
        return tuple(cls(name, rows, ends[-1] if repeated else None) for rows in pairwise(ends))

    @property
    def key(self) -> str:
        """Key for parameters, without dots: ``self_attn/qkv_proj``, with rows ``self_attn/qkv_proj:96-128``."""
        key = self.name.replace(".", "/")
        repeated = "" if self.every is None else f"%{self.every}"
        return key if self.rows is None else f"{key}:{self.rows[0]}-{self.rows[1]}{repeated}"

    def features(self, tensors: Mapping[str, Tensor]) -> int:
        """Number of output features, given the parameters of the block by name."""
        outputs = tensors[f"{self.name}.weight"].shape[0]
        if self.rows is None:
            return outputs
        return (self.rows[1] - self.rows[0]) * (outputs // (self.every or outputs))

    def spread(self, values: Tensor, outputs: int, fill: float) -> Tensor:
        """Place values of these output features, ``[features]``, among all output features, ``[outputs]``.

        Args:
            values: one value for each feature, in their order.
            outputs: number of output features of the linear.
            fill: value of all other output features.
        """
        if self.rows is None:
            return values
        (start, stop), every = self.rows, self.every or outputs
        return pad(values.unflatten(0, (-1, stop - start)), (start, every - stop), value=fill).flatten()

    def __str__(self) -> str:
        repeated = "" if self.every is None else f" of every {self.every}"
        return self.name if self.rows is None else f"{self.name}[{self.rows[0]}:{self.rows[1]}{repeated}]"


Linear = str | LinearRef
"""A reference to a linear in an equivalence: a ``LinearRef``, or the name of a whole linear."""
