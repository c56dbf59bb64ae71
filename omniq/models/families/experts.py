# SPDX-License-Identifier: Apache-2.0
"""Mixtures of experts with the attention of LLaMA, Qwen3 or OLMo: Mixtral, Qwen2-MoE, Qwen3-MoE, OLMoE.

The router reads the norm before the experts, too, so no scale moves out of it.
"""

from dataclasses import replace
from typing import Any

from omniq.models.families.llama import LLAMA
from omniq.models.families.olmo import OLMO
from omniq.models.families.qwen3 import QWEN3
from omniq.models.family import Family
from omniq.models.layout import Layout
from omniq.transforms.equivalences import UpToDown


class _Experts(Family):
    def layout(self, block: Any, index: int) -> Layout:
        layout, mlp = super().layout(block, index), block.mlp
        if not hasattr(mlp, "experts"):  # a dense layer
            return layout
        shared = [f"mlp.shared_expert.{name}_proj" for name in ("gate", "up", "down")] * hasattr(mlp, "shared_expert")
        experts = [[f"mlp.experts.{k}.{name}" for name in mlp.experts.names] for k in range(mlp.experts.num_experts)]
        mlps = [shared[:2], shared[2:], *(each[:2] for each in experts), *(each[2:] for each in experts)]
        groups = layout.groups[:2] + tuple(tuple(group) for group in mlps if group)
        attention = [each for each in layout.equivalences if each.divided.name.startswith(("input_", "self_attn"))]
        if getattr(block.self_attn.config, "clip_qkv", None):  # OLMoE may clip queries, keys and values
            attention = [each for each in attention if each.kind == "norm"]
        ups = [UpToDown(up, down) for _, up, down in filter(None, (shared, *experts))]
        kept = dict.fromkeys(["mlp.gate", *["mlp.shared_expert_gate"] * bool(shared)], "router or gate of experts")
        return replace(layout, groups=groups, equivalences=(*attention, *ups), flat=tuple(shared), kept=kept)


def _with_experts(family: Family, *model_types: str) -> Family:
    return _Experts(**vars(replace(family, model_types=model_types, new_biases=False)))


MIXTRAL, QWEN3_MOE = _with_experts(LLAMA, "mixtral", "qwen2_moe"), _with_experts(QWEN3, "qwen3_moe")
OLMOE = _with_experts(replace(OLMO, equivalences=(LLAMA.equivalences[0], *OLMO.equivalences)), "olmoe")
