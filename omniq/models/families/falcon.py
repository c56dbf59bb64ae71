# SPDX-License-Identifier: Apache-2.0
"""Falcon: LayerNorm, GELU, and one fused linear with rows ``[q .. q k v]`` of each KV head.

Attention and MLP run in parallel. They read one norm (7b with one KV head, 11b) or two (40b, 180B). The rw models run
them in turn, with ALiBi and one key and value for each query head.

Its attention does not use transformers' attention interface, so queries, keys and values cannot be quantized.
"""

from typing import Any

from omniq.models.families.bloom import DOWN, GROUPS, OUTPUT, QKV, UP
from omniq.models.family import Family
from omniq.models.layout import Layout
from omniq.transforms.equivalences import NormToLinears, QueryKey, ValueToOutput
from omniq.transforms.heads import Heads
from omniq.transforms.linear_ref import LinearRef


class _Falcon(Family):
    def layout(self, block: Any, index: int) -> Layout:
        attention, config = block.self_attention, block.config
        heads = Heads(attention.num_heads, attention.num_kv_heads)
        width = attention.head_dim
        widths = (heads.query // heads.key * width, width, width)  # all queries of one KV head, its key, its value
        query, key, value = LinearRef.split(QKV, widths, repeated=True)
        two = hasattr(block, "ln_attn")
        first, second = ("ln_attn", "ln_mlp") if two else ("input_layernorm", "post_attention_layernorm")
        groups, norms = GROUPS, [NormToLinears(first, (QKV,)), NormToLinears(second, (UP,))]
        if not hasattr(block, second):
            groups, norms = ((QKV, UP), (OUTPUT,), (DOWN,)), [NormToLinears(first, (QKV, UP))]
        rotary = None if config.alibi else "half"
        equivalences = (*norms, ValueToOutput(value, OUTPUT), QueryKey(query, key, rotary=rotary))
        return Layout(config.model_type, groups, heads, equivalences)


FALCON = _Falcon(("falcon",), "transformer.h", GROUPS, returns_tuple=True, batched=("alibi",))
