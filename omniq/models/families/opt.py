# SPDX-License-Identifier: Apache-2.0
"""OPT: LayerNorm, biases on every linear, learned positions, ReLU; one size has ``project_in`` and ``project_out``.

All sizes but one normalise before attention and before the MLP. OPT-350m normalises after the residual sum. There, a
norm feeds the next residual as well as the linears, so no scale can move between them.
"""

from dataclasses import replace
from typing import Any

from omniq.models.family import Family
from omniq.models.layout import Layout
from omniq.transforms.equivalences import NormToLinears, QueryKey, UpToDown, ValueToOutput

ATTENTION = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")


class _Opt(Family):
    def layout(self, block: Any, index: int) -> Layout:
        layout, config = super().layout(block, index), block.self_attn.config
        holds = {
            "norm": config.do_layer_norm_before and config.layer_norm_elementwise_affine,
            "up_down": config.activation_function == "relu",
        }
        return replace(layout, equivalences=tuple(each for each in layout.equivalences if holds.get(each.kind, True)))


OPT = _Opt(
    model_types=("opt",),
    blocks="model.decoder.layers",
    groups=(ATTENTION, ("self_attn.out_proj",), ("fc1",), ("fc2",)),
    equivalences=(
        NormToLinears("self_attn_layer_norm", ATTENTION),
        NormToLinears("final_layer_norm", ("fc1",)),
        ValueToOutput("self_attn.v_proj", "self_attn.out_proj"),
        QueryKey("self_attn.q_proj", "self_attn.k_proj", rotary=None),
        UpToDown("fc1", "fc2"),
    ),
    attention="self_attn",
    flat=("fc1", "fc2"),
)
