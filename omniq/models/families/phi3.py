# SPDX-License-Identifier: Apache-2.0
"""Phi-3 and Phi-4: LLaMA's block with two fused linears, whose rows are ``[q | k | v]`` and ``[gate | up]``."""

from dataclasses import replace

from torch import nn

from omniq.models.family import Family, config_of
from omniq.models.layout import Layout
from omniq.transforms.equivalences import NormToLinears, QueryKey, UpToDown, ValueToOutput
from omniq.transforms.linear_ref import LinearRef

QKV, GATE_UP = "self_attn.qkv_proj", "mlp.gate_up_proj"


class _Phi3(Family):
    def layout(self, block: nn.Module, index: int) -> Layout:
        layout, config = super().layout(block, index), config_of(block)
        size = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        widths = (layout.heads.query * size, layout.heads.key * size, layout.heads.key * size)
        query, key, value = LinearRef.split(QKV, widths)
        _, up = LinearRef.split(GATE_UP, (config.intermediate_size,) * 2)
        equivalences = (
            NormToLinears("input_layernorm", (QKV,)),
            NormToLinears("post_attention_layernorm", (GATE_UP,)),
            ValueToOutput(value, "self_attn.o_proj"),
            QueryKey(query, key, rotary="half"),
            UpToDown(up, "mlp.down_proj"),
        )
        return replace(layout, equivalences=equivalences)


PHI3 = _Phi3(
    model_types=("phi3",),
    blocks="model.layers",
    groups=((QKV,), ("self_attn.o_proj",), (GATE_UP,), ("mlp.down_proj",)),
    attention="self_attn",
    partial_rotary=True,
)
