# SPDX-License-Identifier: Apache-2.0
"""Query and key: divide rows of ``Wq`` and ``bq`` by ``s``; multiply rows of ``Wk`` and ``bk`` by ``s``, in each head.

Channels that rotary embedding turns as a pair share one scale. If queries and keys have norms, the scale goes into the
weights of the norms. A norm over one head is shared by all heads, so the scale is shared too.

Shapes: ``H`` query heads, ``K`` KV heads, ``c`` channels of a head, ``P`` channels of a head after tying pairs.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from omniq.transforms.equivalence import Equivalence
from omniq.transforms.heads import Heads
from omniq.transforms.linear_ref import Linear, LinearRef
from omniq.transforms.transformed_tensors import TransformedTensors


@dataclass(frozen=True)
class QueryKey(Equivalence):
    """Rows of the query projection and rows of the key projection.

    Args:
        query, key: the projections, ``[H c]`` and ``[K c]`` output features.
        rotary: how rotary embedding pairs the channels of a head: ``half`` (i with i + d/2), ``interleaved``
            (2i with 2i + 1), or None without rotary embedding.
        query_norm, key_norm: norms between projection and rotary embedding; None if the family has none.
        offset: these norms multiply by ``offset + weight``.
    """

    kind: ClassVar[str] = "query_key"
    query: Linear
    key: Linear
    rotary: str | None = "half"
    query_norm: str | None = None
    key_norm: str | None = None
    offset: float = 0.0

    @property
    def divided(self) -> LinearRef:
        return LinearRef.of(self.query)

    @property
    def multiplied(self) -> LinearRef:
        """The projection whose output is multiplied."""
        return LinearRef.of(self.key)

    @property
    def readers(self) -> tuple[str, ...]:
        return ()

    @property
    def modules(self) -> tuple[str, ...]:
        return (self.divided.name, self.multiplied.name)

    @property
    def factored(self) -> tuple[str, ...]:
        sides = ((self.divided, self.query_norm), (self.multiplied, self.key_norm))
        return tuple(linear.name for linear, norm in sides if norm is None)

    def shapes(self, tensors: Mapping[str, Tensor], heads: Heads) -> dict[str, tuple[int, ...]]:
        """Shape of the scale: ``[K, P]``, or ``[P]`` if all heads share a norm over one head."""
        channels = self.multiplied.features(tensors) // heads.key
        tied = int(heads.tied_channels(channels, self.rotary).max()) + 1
        norms = [tensors[f"{norm}.weight"] for norm in (self.query_norm, self.key_norm) if norm is not None]
        shared = any(norm.numel() == channels for norm in norms)
        return {"log_scale": (tied,) if shared else (heads.key, tied)}

    def apply(self, tensors: TransformedTensors, scale: Tensor, shift: Tensor | None) -> None:
        heads = tensors.heads
        channels = tensors.features(self.multiplied) // heads.key
        tied = heads.tied_on(scale.device, channels, self.rotary)
        on_keys = scale.index_select(-1, tied).expand(heads.key, -1).flatten()  # [K c]
        on_queries = heads.to_query(on_keys)  # [H c]
        sides = ((self.divided, on_queries, self.query_norm), (self.multiplied, 1 / on_keys, self.key_norm))
        for linear, divisor, norm in sides:
            if norm is None:
                tensors.divide(linear, divisor)
                continue
            weight = tensors.plain[f"{norm}.weight"]
            # A norm over one head has the same scale in every head: use the first. Other norms are [H c] or [H, c].
            divisor = divisor[:channels] if weight.numel() == channels else divisor
            tensors.divide_norm(norm, divisor.reshape(weight.shape), offset=self.offset)
