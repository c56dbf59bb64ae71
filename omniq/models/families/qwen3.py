# SPDX-License-Identifier: Apache-2.0
"""Qwen3: LLaMA's block with an RMSNorm on every query and key head before rotary embedding.

Its linears get no new biases. transformers supports them under ``attention_bias``, but vLLM builds the output
projection of Qwen3 without a bias whatever the config says, and ignores a stored bias without a message. It would
therefore drop the bias that compensates for a shift of the values, although transformers runs the checkpoint correctly.
"""

from dataclasses import replace

from omniq.models.families.llama import LLAMA
from omniq.transforms.equivalences import QueryKey

QWEN3 = replace(
    LLAMA,
    model_types=("qwen3",),
    new_biases=False,
    equivalences=(
        *(equivalence for equivalence in LLAMA.equivalences if equivalence.kind != QueryKey.kind),
        QueryKey(
            "self_attn.q_proj",
            "self_attn.k_proj",
            rotary="half",
            query_norm="self_attn.q_norm",
            key_norm="self_attn.k_norm",
        ),
    ),
)
