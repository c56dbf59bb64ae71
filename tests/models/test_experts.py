# SPDX-License-Identifier: Apache-2.0
"""Experts as linears compute what transformers' merged experts compute, and get their weights from either layout."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from omniq.models.experts import LinearExperts, split_experts
from omniq.models.source import SourceModel
from tests.helpers.linear_experts import with_linear_experts
from tests.helpers.opening import stream, tokens
from tests.helpers.tiny import tiny_model
from tests.helpers.zoo import zoo_model

TYPES = [
    "mixtral",
    "qwen2_moe",
    "qwen3_moe",
    "olmoe",
    "deepseek_v2",
    "deepseek_v3",
    "glm4_moe",
    "minimax",
    "minimax_m2",
]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("model_type", TYPES)
@torch.no_grad()
def test_linear_experts_equal_merged_experts(model_type: str, dtype: torch.dtype) -> None:
    model = zoo_model(model_type).to(dtype)
    split = with_linear_experts(model)
    assert any(isinstance(module, LinearExperts) for module in split.modules())
    assert torch.equal(split(tokens()).logits, model(tokens()).logits)


def test_linear_experts_call_reached_experts_only_and_gates_and_ups_first() -> None:
    model = with_linear_experts(tiny_model("mixtral"))
    experts = model.get_submodule("model.layers.0.mlp.experts")
    called: list[str] = []
    for name, module in experts.named_modules():
        if isinstance(module, torch.nn.Linear):
            module.register_forward_pre_hook(lambda _, args, name=name: called.append(name))
    experts(torch.randn(3, 64), torch.tensor([[2, 0], [0, 2], [2, 0]]), torch.ones(3, 2))
    assert called == ["0.w1", "0.w3", "2.w1", "2.w3", "0.w2", "2.w2"]


@pytest.mark.parametrize("model_type", ["mixtral", "qwen2_moe"])
@pytest.mark.parametrize("merged", [True, False])
@torch.no_grad()
def test_source_model_reads_experts_of_either_layout(tmp_path: Path, model_type: str, merged: bool) -> None:
    """``save_pretrained`` writes one tensor for each expert; the module of transformers holds merged ones."""
    model = tiny_model(model_type)
    model.save_pretrained(tmp_path)
    if merged:
        save_file(dict(model.state_dict()), tmp_path / "model.safetensors", {"format": "pt"})
    source = SourceModel.open(tmp_path)
    assert torch.equal(stream(source, tokens()), model(tokens()).logits)
    names = {name for name, _ in source.shapes() if "experts" in name}
    assert len(names) == 4 * 3 * (2 if model_type == "mixtral" else 1)  # the second block of qwen2_moe is dense


@pytest.mark.parametrize("model_type", ["gpt_oss", "granitemoe"])
def test_experts_that_no_checkpoint_stores_singly_stay_merged(model_type: str) -> None:
    model = split_experts(zoo_model(model_type))
    assert not any(isinstance(module, LinearExperts) for module in model.modules())
