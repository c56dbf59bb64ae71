# SPDX-License-Identifier: Apache-2.0
"""``LinearRef``: a linear of a block, or a range of the output features of a fused linear.

Phi-3 computes queries, keys and values with one linear ``self_attn.qkv_proj``, rows ``[q | k | v]``. An equivalence
that scales the values names ``LinearRef("self_attn.qkv_proj", (start, stop))``. A plain string names a whole linear.
"""

from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class LinearRef:
    """A linear, or some of its output features.

    Args:
        name: name of the linear inside the block.
        rows: index of the first output feature and of the one after the last; None for all.
    """

    name: str
    rows: tuple[int, int] | None = None

    @classmethod
    def of(cls, linear: "str | LinearRef") -> "LinearRef":
        """The reference itself, or the whole linear of this name."""
        return cls(linear) if isinstance(linear, str) else linear

    @property
    def key(self) -> str:
        """Key for parameters, without dots: ``self_attn/qkv_proj``, with rows ``self_attn/qkv_proj:96-128``."""
        key = self.name.replace(".", "/")
        return key if self.rows is None else f"{key}:{self.rows[0]}-{self.rows[1]}"

    def features(self, tensors: Mapping[str, Tensor]) -> int:
        """Number of output features, given the parameters of the block by name."""
        if self.rows is not None:
            return self.rows[1] - self.rows[0]
        return tensors[f"{self.name}.weight"].shape[0]

    def __str__(self) -> str:
        return self.name if self.rows is None else f"{self.name}[{self.rows[0]}:{self.rows[1]}]"


Linear = str | LinearRef
"""A reference to a linear in an equivalence: a ``LinearRef``, or the name of a whole linear."""
