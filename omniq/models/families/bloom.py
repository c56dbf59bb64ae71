# SPDX-License-Identifier: Apache-2.0
"""BLOOM: LayerNorm, biases on every linear, ALiBi, GELU; the rows of the fused linear are ``[q k v]`` of each head.

Its attention does not use transformers' attention interface, so queries, keys and values cannot be quantized.
"""

from typing import Any

from transformers import PretrainedConfig

from omniq.models.family import Family
from omniq.models.layout import Layout
from omniq.transforms.equivalence import Equivalence
from omniq.transforms.equivalences import NormToLinears, QueryKey, ValueToOutput
from omniq.transforms.heads import Heads
from omniq.transforms.linear_ref import LinearRef

QKV, OUTPUT = "self_attention.query_key_value", "self_attention.dense"
UP, DOWN = "mlp.dense_h_to_4h", "mlp.dense_4h_to_h"
GROUPS: tuple[tuple[str, ...], ...] = ((QKV,), (OUTPUT,), (UP,), (DOWN,))


def _refuse(config: PretrainedConfig) -> str | None:
    exact = config.slow_but_exact and config.pretraining_tp > 1
    return "BLOOM with slow_but_exact multiplies parts of its weights: set slow_but_exact to false" if exact else None


class _Bloom(Family):
    def layout(self, block: Any, index: int) -> Layout:
        query, key, value = LinearRef.split(QKV, [block.self_attention.head_dim] * 3, repeated=True)
        equivalences: list[Equivalence] = [ValueToOutput(value, OUTPUT), QueryKey(query, key, rotary=None)]
        if not block.apply_residual_connection_post_layernorm:  # else the residual reads the norms, too
            norms = NormToLinears("input_layernorm", (QKV,)), NormToLinears("post_attention_layernorm", (UP,))
            equivalences = [*norms, *equivalences]
        return Layout("bloom", self.groups, Heads(block.num_heads, block.num_heads), tuple(equivalences))


BLOOM = _Bloom(("bloom",), "transformer.h", GROUPS, returns_tuple=True, batched=("alibi",), refuse=_refuse)
