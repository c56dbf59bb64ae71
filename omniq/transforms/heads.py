# SPDX-License-Identifier: Apache-2.0
"""Attention heads: which query heads share keys and values, and which channels rotary embedding turns together.

- Grouped-query attention (multi-query with one KV head) repeats each KV head in place, so query head ``h`` reads KV
  head ``h // (H / K)``.
- Rotary embedding turns channels of a head in pairs: ``half`` pairs i with i + r/2, ``interleaved`` pairs 2i with
  2i + 1, among the first ``r`` channels. It commutes with a scale only if both channels of a pair have the same scale.

Shapes: ``H`` query heads, ``K`` KV heads, ``c`` channels of a head, ``P`` channels of a head after tying pairs.
"""

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True)
class Heads:
    """Attention heads of a block.

    Args:
        query: number of query heads ``H``.
        key: number of KV heads ``K``; divides ``H``.
        rotary: number of leading channels of a head that rotary embedding turns; None for all.
    """

    query: int
    key: int
    rotary: int | None = None
    _tied: dict[tuple[torch.device, int, str | None], Tensor] = field(default_factory=dict, compare=False, repr=False)

    @classmethod
    def of(cls, config: Any, partial_rotary: bool = False) -> "Heads":
        """Create from the config of a transformers model.

        Args:
            config: the config.
            partial_rotary: True if the code of the model uses ``partial_rotary_factor``. LLaMA's code does not: it
                turns whole heads even if its config has that key.
        """
        query = config.num_attention_heads
        size = getattr(config, "head_dim", None) or config.hidden_size // query
        rope = (getattr(config, "rope_parameters", None) or {}) if partial_rotary else {}
        share = rope.get("partial_rotary_factor", 1.0)
        rotary = None if share == 1 else int(size * share)
        return cls(query, getattr(config, "num_key_value_heads", None) or query, rotary)

    def to_query(self, per_key: Tensor) -> Tensor:
        """Expand values of KV channels over the query heads that read them: ``[K c] -> [H c]``."""
        return per_key.unflatten(0, (self.key, -1)).repeat_interleave(self.query // self.key, 0).flatten()

    def by_key(self, per_query: Tensor) -> Tensor:
        """Gather values of query channels by the KV channel that they read: ``[H c] -> [K c, H / K]``."""
        return per_query.unflatten(0, (self.key, self.query // self.key, -1)).transpose(1, 2).flatten(0, 1)

    def tied_channels(self, channels: int, layout: str | None) -> Tensor:
        """Index of the parameter, among ``P``, of each channel of a head, int64 ``[c]``.

        Args:
            channels: number of channels of a head.
            layout: ``half``, ``interleaved``, or None without rotary embedding, which ties no channels.
        """
        position = torch.arange(channels)
        if layout is None:
            return position
        turned = channels if self.rotary is None else self.rotary
        pair = position % (turned // 2) if layout == "half" else position // 2
        return torch.where(position < turned, pair, position - turned // 2)

    def tied_on(self, device: torch.device, channels: int, layout: str | None) -> Tensor:
        """``tied_channels`` on a device; cached, because a CUDA graph cannot capture a copy from the host."""
        where = (device, channels, layout)
        if where not in self._tied:
            self._tied[where] = self.tied_channels(channels, layout).to(device)
        return self._tied[where]
