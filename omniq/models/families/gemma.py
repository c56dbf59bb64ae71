# SPDX-License-Identifier: Apache-2.0
"""Gemma: LLaMA's block with norms that multiply by ``1 + w``.

Gemma 2 and 3 also normalise the outputs of attention and MLP before the residual sum; no linear reads these norms.
Gemma 3 also normalises every query and key head. Gemma 2 caps the logits of attention, so its attention is always
eager. No linear gets a new bias, because it is unknown whether other runtimes use
``attention_bias`` of these families.
"""

from dataclasses import replace

from omniq.models.families.llama import LLAMA
from omniq.transforms.equivalences import NormToLinears, QueryKey, UpToDown, ValueToOutput

ATTENTION, MLP = LLAMA.groups[0], LLAMA.groups[2]
_SHARED = (ValueToOutput("self_attn.v_proj", "self_attn.o_proj"), UpToDown("mlp.up_proj", "mlp.down_proj"))
_QUERY_KEY = QueryKey("self_attn.q_proj", "self_attn.k_proj", rotary="half")

GEMMA = replace(
    LLAMA,
    model_types=("gemma",),
    new_biases=False,
    equivalences=(
        NormToLinears("input_layernorm", ATTENTION, offset=1),
        NormToLinears("post_attention_layernorm", MLP, offset=1),
        *_SHARED,
        _QUERY_KEY,
    ),
)
GEMMA2 = replace(
    GEMMA,
    model_types=("gemma2",),
    equivalences=(
        NormToLinears("input_layernorm", ATTENTION, offset=1),
        NormToLinears("pre_feedforward_layernorm", MLP, offset=1),
        *_SHARED,
        _QUERY_KEY,
    ),
)
GEMMA3 = replace(
    GEMMA2,
    model_types=("gemma3_text",),
    equivalences=(
        *GEMMA2.equivalences[:-1],
        replace(_QUERY_KEY, query_norm="self_attn.q_norm", key_norm="self_attn.k_norm", offset=1),
    ),
)
