# SPDX-License-Identifier: Apache-2.0
"""OLMo 2 and 3: LLaMA's block with norms after attention and MLP instead of before them.

The linears read the residual stream, so no scale can move out of a norm. Norms over all query channels and over all key
channels precede the rotary embedding.
"""

from dataclasses import replace

from omniq.models.families.llama import LLAMA
from omniq.transforms.equivalences import QueryKey, UpToDown, ValueToOutput

OLMO = replace(
    LLAMA,
    model_types=("olmo2", "olmo3"),
    new_biases=False,
    equivalences=(
        ValueToOutput("self_attn.v_proj", "self_attn.o_proj"),
        QueryKey(
            "self_attn.q_proj",
            "self_attn.k_proj",
            rotary="half",
            query_norm="self_attn.q_norm",
            key_norm="self_attn.k_norm",
        ),
        UpToDown("mlp.up_proj", "mlp.down_proj"),
    ),
)
