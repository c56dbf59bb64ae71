# SPDX-License-Identifier: Apache-2.0
"""OPT: LayerNorm, biases on every linear, learned positions, ReLU; one size has ``project_in`` and ``project_out``.

All sizes but one normalise before attention and before the MLP. OPT-350m normalises after the residual sum. There, a
norm feeds the next residual as well as the linears, so no scale can move between them; this size is refused.
"""

from transformers import PretrainedConfig

from omniq.models.family import Family
from omniq.transforms.equivalences import NormToLinears, QueryKey, ValueToOutput


def _refuse(config: PretrainedConfig) -> str | None:
    if config.do_layer_norm_before:
        return None
    return "OPT with do_layer_norm_before=false (opt-350m) normalises after the residual sum: use another size of OPT"


OPT = Family(
    model_types=("opt",),
    blocks="model.decoder.layers",
    groups=(
        ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
        ("self_attn.out_proj",),
        ("fc1",),
        ("fc2",),
    ),
    equivalences=(
        NormToLinears("self_attn_layer_norm", ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")),
        NormToLinears("final_layer_norm", ("fc1",)),
        ValueToOutput("self_attn.v_proj", "self_attn.out_proj"),
        QueryKey("self_attn.q_proj", "self_attn.k_proj", rotary=None),
    ),
    attention="self_attn",
    flat=("fc1", "fc2"),
    refuse=_refuse,
)
