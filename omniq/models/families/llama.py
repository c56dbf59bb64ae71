# SPDX-License-Identifier: Apache-2.0
"""LLaMA and the families that share its block: grouped-query attention, rotary embedding, gated MLP, RMSNorm."""

from omniq.models.family import Family
from omniq.transforms.equivalences import NormToLinears, QueryKey, UpToDown, ValueToOutput

LLAMA = Family(
    model_types=("llama", "mistral", "qwen2", "granite", "smollm3"),
    blocks="model.layers",
    groups=(
        ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
        ("self_attn.o_proj",),
        ("mlp.gate_proj", "mlp.up_proj"),
        ("mlp.down_proj",),
    ),
    equivalences=(
        NormToLinears("input_layernorm", ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")),
        NormToLinears("post_attention_layernorm", ("mlp.gate_proj", "mlp.up_proj")),
        ValueToOutput("self_attn.v_proj", "self_attn.o_proj"),
        QueryKey("self_attn.q_proj", "self_attn.k_proj", rotary="half"),
        UpToDown("mlp.up_proj", "mlp.down_proj"),
    ),
    attention="self_attn",
)
