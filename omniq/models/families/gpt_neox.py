# SPDX-License-Identifier: Apache-2.0
"""GPT-NeoX and Pythia: LayerNorm, biases, partial rotary embedding; the rows of the fused linear are ``[q k v]`` of
each head. Attention and MLP run in parallel with two norms, or in turn."""

from dataclasses import replace
from typing import Any

from omniq.models.family import Family
from omniq.models.layout import Layout
from omniq.transforms.equivalences import NormToLinears, QueryKey, ValueToOutput
from omniq.transforms.linear_ref import LinearRef

QKV, OUTPUT = "attention.query_key_value", "attention.dense"
UP, DOWN = "mlp.dense_h_to_4h", "mlp.dense_4h_to_h"


class _GptNeoX(Family):
    def layout(self, block: Any, index: int) -> Layout:
        query, key, value = LinearRef.split(QKV, [block.attention.head_size] * 3, repeated=True)
        equivalences = (
            NormToLinears("input_layernorm", (QKV,)),
            NormToLinears("post_attention_layernorm", (UP,)),
            ValueToOutput(value, OUTPUT),
            QueryKey(query, key, rotary="half"),
        )
        return replace(super().layout(block, index), equivalences=equivalences)


GPT_NEOX = _GptNeoX(
    model_types=("gpt_neox",),
    blocks="gpt_neox.layers",
    groups=((QKV,), (OUTPUT,), (UP,), (DOWN,)),
    attention="attention",
    partial_rotary=True,
)
