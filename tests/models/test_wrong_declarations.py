# SPDX-License-Identifier: Apache-2.0
"""Equivalences that look right for a family and are wrong: verification of the real block refuses each of them."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from omniq.models.families import family_of_type
from omniq.models.layout import Layout
from omniq.models.verify_equivalences import TOLERANCE, VerifiedBlock
from omniq.transforms.equivalence import Equivalence
from omniq.transforms.equivalences import NormToLinears, UpToDown, ValueToOutput
from omniq.transforms.heads import Heads
from tests.helpers.float64_block import NEW_DECODER
from tests.helpers.tiny import tiny_block

QKV = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")
FUSED = "self_attention.query_key_value"
VALUE = ValueToOutput("self_attn.v_proj", "self_attn.o_proj")
SIZES: dict[str, Any] = {
    "hidden_size": 64,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "vocab_size": 272,
    "max_position_embeddings": 128,
    "num_experts_per_tok": 2,
    "layer_types": ["full_attention"] * 2,
    "experts_implementation": "eager",
}


def declared(family: str, **overrides: Any) -> VerifiedBlock:
    """The first block of a tiny model of a declared family."""
    block, kwargs = tiny_block(family, **overrides)
    return VerifiedBlock(block, family_of_type(family).layout(block, 0), torch.randn(1, 16, 64), kwargs, torch.float64)


def undeclared(model_type: str, **overrides: Any) -> VerifiedBlock:
    """The first block of a tiny model whose attention is named as in LLaMA, with room for new biases."""
    config = AutoConfig.for_model(model_type, **SIZES | overrides)
    model = AutoModelForCausalLM.from_config(config, attn_implementation="eager").eval().requires_grad_(False)
    for name, value in model.named_parameters():
        width = value.shape[-1] if value.dim() > 1 else 9
        value.copy_(torch.randn(value.shape) / width**0.5 + ("norm" in name))
    seen: dict[str, Any] = {}
    block = model.get_submodule("model.layers")[0]
    handle = block.register_forward_pre_hook(lambda _, args, kwargs: seen.update(kwargs), with_kwargs=True)
    model(torch.arange(16)[None], use_cache=False)
    handle.remove()
    layout = Layout(model_type, (QKV,), Heads(4, 2), can_bias=frozenset({"self_attn.v_proj", "self_attn.o_proj"}))
    return VerifiedBlock(block, layout, torch.randn(1, 16, 64), seen, torch.float64)


@pytest.mark.parametrize(
    ("family", "overrides", "wrong"),
    [
        ("olmo2", {}, NormToLinears("post_attention_layernorm", ("mlp.gate_proj", "mlp.up_proj"))),
        ("opt", {"do_layer_norm_before": False}, NormToLinears("self_attn_layer_norm", ("fc1",))),
        ("opt", {"activation_function": "gelu"}, UpToDown("fc1", "fc2")),
        ("bloom", {"apply_residual_connection_post_layernorm": True}, NormToLinears("input_layernorm", (FUSED,))),
        ("falcon", {}, NormToLinears("input_layernorm", (FUSED,))),  # the MLP reads this norm, too
        ("falcon", NEW_DECODER, NormToLinears("ln_attn", (FUSED, "mlp.dense_h_to_4h"))),
        ("gpt_neox", {}, UpToDown("mlp.dense_h_to_4h", "mlp.dense_4h_to_h")),
    ],
)
def test_verified_block_refuses_wrong_declaration_of_family(
    family: str, overrides: dict[str, Any], wrong: Equivalence
) -> None:
    assert declared(family, **overrides).error(wrong) > 0.05


@pytest.mark.parametrize(
    ("model_type", "overrides", "wrong", "right"),
    [  # attention sinks, a gate after attention, and norms that multiply by 1 + w
        ("gpt_oss", {"num_local_experts": 4}, VALUE, replace(VALUE, shift=False)),
        ("qwen3_next", {"num_experts": 4, "moe_intermediate_size": 32}, VALUE, replace(VALUE, shift=False)),
        (
            "qwen3_next",
            {"num_experts": 4, "moe_intermediate_size": 32},
            NormToLinears("input_layernorm", QKV),
            NormToLinears("input_layernorm", QKV, offset=1),
        ),
        ("minimax", {"num_local_experts": 4}, NormToLinears("input_layernorm", QKV), VALUE),  # the residual reads it
    ],
)
def test_verified_block_refuses_wrong_declaration_of_undeclared_family(
    model_type: str, overrides: dict[str, Any], wrong: Equivalence, right: Equivalence
) -> None:
    block = undeclared(model_type, **overrides)
    assert block.error(wrong) > 0.05  # measured 0.11 and more
    assert block.error(right) < 1e-12 < TOLERANCE[torch.float64]
