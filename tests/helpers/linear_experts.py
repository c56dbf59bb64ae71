# SPDX-License-Identifier: Apache-2.0
"""A model of transformers whose experts become linears with the same weights."""

import copy

from transformers import PreTrainedModel

from omniq.models.experts import LinearExperts, split_experts


def with_linear_experts(model: PreTrainedModel) -> PreTrainedModel:
    """A copy of a model, in which every expert has one linear for each projection."""
    split = split_experts(copy.deepcopy(model))
    for place, experts in split.named_modules():
        if isinstance(experts, LinearExperts):
            merged = model.get_submodule(place)
            for number, (gate_up, down) in enumerate(zip(merged.gate_up_proj, merged.down_proj, strict=True)):
                for name, weight in zip(experts.names, (*gate_up.chunk(2), down), strict=True):
                    experts.get_submodule(f"{number}.{name}").weight.data.copy_(weight.data)
    return split.requires_grad_(False).eval()
