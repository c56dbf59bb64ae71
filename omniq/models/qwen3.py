# SPDX-License-Identifier: Apache-2.0
"""Qwen3: LLaMA's block with an RMSNorm on every query and key head before rotary embedding."""

from dataclasses import replace

from omniq.models.family import QueryKey
from omniq.models.llama import LLAMA

QWEN3 = replace(
    LLAMA,
    model_types=("qwen3",),
    equivalences=(
        *(equivalence for equivalence in LLAMA.equivalences if not isinstance(equivalence, QueryKey)),
        QueryKey(
            "self_attn.q_proj",
            "self_attn.k_proj",
            rotary="half",
            query_norm="self_attn.q_norm",
            key_norm="self_attn.k_norm",
        ),
    ),
)
