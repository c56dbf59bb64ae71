# SPDX-License-Identifier: Apache-2.0
"""Undeclared families: blocks, groups, kept matrices and equivalences are found; unfit models are refused."""

import json
import time
from pathlib import Path

import pytest
import torch
from torch import nn

from omniq.errors import NotByBlocks
from omniq.models.checkpoint import SafetensorsCheckpoint
from omniq.models.discover import groups_of
from omniq.models.layout import Layout
from omniq.models.self_test import check_streaming, streaming_error
from omniq.models.source import SourceModel
from omniq.models.trace import Trace
from omniq.transforms.equivalence import Equivalence
from omniq.transforms.equivalences import NormToLinears, QueryKey, ValueToOutput
from tests.helpers.opening import refused, tokens
from tests.helpers.zoo import zoo_model

CPU = torch.device("cpu")
ATTENTION = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")
OUTPUT, DOWN = ("self_attn.o_proj",), ("mlp.down_proj",)
GATED = (ATTENTION, OUTPUT, ("mlp.gate_proj", "mlp.up_proj"), DOWN)
QUERY = "query_key of self_attn.q_proj"
NORMS: dict[str, int | str | None] = {"norm of input_layernorm": 0, "norm of post_attention_layernorm": 0}

# The groups of the last block of a variant, and the divided modules of its equivalences. The number is the offset of a
# norm, the power of another equivalence, and -1 for values whose shift is not exact. Queries and keys have their rotary
# layout instead.
DOZEN: dict[str, tuple[tuple[tuple[str, ...], ...], dict[str, int | str | None]]] = {
    "stablelm": (GATED, NORMS | {QUERY: "half", "value_output of self_attn.v_proj": 1, "up_down of mlp.up_proj": 1}),
    "nemotron": (
        (ATTENTION, OUTPUT, ("mlp.up_proj",), DOWN),
        dict.fromkeys(NORMS, 1) | {QUERY: "half", "value_output of self_attn.v_proj": 1, "up_down of mlp.up_proj": 2},
    ),
    "cohere": (
        ((*ATTENTION, "mlp.gate_proj", "mlp.up_proj"), OUTPUT, DOWN),
        {"norm of input_layernorm": 0, QUERY: "interleaved"}
        | {"value_output of self_attn.v_proj": 1, "up_down of mlp.up_proj": 1},
    ),
    "exaone4": (GATED, {QUERY: None, "value_output of self_attn.v_proj": 1, "up_down of mlp.up_proj": 1}),
    "glm": (
        (ATTENTION, OUTPUT, ("mlp.gate_up_proj",), DOWN),
        NORMS
        | {QUERY: "interleaved", "value_output of self_attn.v_proj": 1, "up_down of mlp.gate_up_proj[128:256]": 1},
    ),
    "persimmon": (
        (("self_attn.query_key_value",), ("self_attn.dense",), ("mlp.dense_h_to_4h",), ("mlp.dense_4h_to_h",)),
        NORMS
        | {"query_key of self_attn.query_key_value[0:64]": "half"}
        | {"value_output of self_attn.query_key_value[32:48 of every 48]": 1, "up_down of mlp.dense_h_to_4h": 2},
    ),
    "mpt": (
        (("attn.Wqkv",), ("attn.out_proj",), ("ffn.up_proj",), ("ffn.down_proj",)),
        {"norm of norm_1": 0, "norm of norm_2": 0}
        | {"query_key of attn.Wqkv[0:64]": None, "value_output of attn.Wqkv[128:192]": 1},
    ),
    "vaultgemma": (
        GATED,
        {"norm of input_layernorm": 1, "norm of pre_feedforward_layernorm": 1}
        | {QUERY: "half", "value_output of self_attn.v_proj": 1, "up_down of mlp.up_proj": 1},
    ),
    "gemma4_text": (
        GATED,
        {"norm of input_layernorm": 0, "norm of pre_feedforward_layernorm": 0}
        | {QUERY: "half", "up_down of mlp.up_proj": 1},
    ),
    "gpt_oss": ((ATTENTION, OUTPUT), {"norm of input_layernorm": 0, "value_output of self_attn.v_proj": -1}),
    "bamba": (
        (ATTENTION, OUTPUT, ("feed_forward.gate_proj", "feed_forward.up_proj"), ("feed_forward.down_proj",)),
        {"norm of input_layernorm": 0, "norm of pre_ff_layernorm": 0}
        | {QUERY: "half", "value_output of self_attn.v_proj": 1, "up_down of feed_forward.up_proj": 1},
    ),
    "mamba2": ((("mixer.in_proj",), ("mixer.out_proj",)), {"norm of norm": 0, "norm of mixer.norm": 0}),
}


def opened(folder: Path, name: str) -> SourceModel:
    zoo_model(name).save_pretrained(folder)
    return SourceModel.open(folder)


def measured(equivalence: Equivalence) -> int | str | None:
    if isinstance(equivalence, QueryKey):
        return equivalence.rotary
    if isinstance(equivalence, NormToLinears):
        return int(equivalence.offset)
    return -1 if isinstance(equivalence, ValueToOutput) and not equivalence.shift else int(equivalence.power)


@pytest.mark.parametrize("name", list(DOZEN))
def test_discovered_layout_has_groups_and_verified_equivalences(tmp_path: Path, name: str) -> None:
    source = opened(tmp_path, name)
    assert not source.family.groups  # undeclared
    layout = source.layout(source.num_blocks - 1)
    groups, equivalences = DOZEN[name]
    assert layout.groups == groups
    assert {f"{each.kind} of {each.divided}": measured(each) for each in layout.equivalences} == equivalences
    assert all(error > 1e-3 for error in layout.rejected.values())  # measured: 0.02 and more
    assert streaming_error(source, CPU) <= 1e-6  # measured: 0


def test_discovered_layout_of_equal_blocks_is_shared_and_kept_in_another_dtype(tmp_path: Path) -> None:
    source = opened(tmp_path, "bamba")
    layouts = [source.layout(index) for index in range(source.num_blocks)]
    assert layouts[0].groups[0] == ("mamba.in_proj",)
    assert source.in_dtype(torch.float16).layout(0) is layouts[0]
    same = opened(tmp_path / "same", "stablelm")
    assert same.layout(0) is same.layout(1)


def kept(layout: Layout, reason: str) -> set[str]:
    return {name for name, why in layout.kept.items() if why == reason}


def test_discovered_layout_keeps_matrices_with_reason(tmp_path: Path) -> None:
    layout = opened(tmp_path, "qwen3_5_text").layout(0)
    assert kept(layout, "only 4 outputs") == {"linear_attn.in_proj_a", "linear_attn.in_proj_b"}
    assert kept(layout, "a parameter of Conv1d, not a linear layer") == {"linear_attn.conv1d.weight"}
    norm = layout.equivalences[0]
    assert norm.readers[-1] == "linear_attn.in_proj_a"  # it reads the norm, so its columns change too
    layout = opened(tmp_path / "dbrx", "dbrx").layout(0)
    assert kept(layout, "router or gate of experts") == {"ffn.router.layer"}


def test_discovered_family_records_how_model_calls_blocks(tmp_path: Path) -> None:
    assert opened(tmp_path / "mpt", "mpt").family.returns_tuple
    assert opened(tmp_path / "xglm", "xglm").family.batched == ("attention_mask",)
    assert opened(tmp_path / "llama", "stablelm").family.batched == ()


REFUSED = {
    "gpt2": "its blocks compute with Conv1D, whose transposed weights no export format holds; choose",
    "gemma4_text e2b": "its blocks take the argument per_layer_input, which depends on the sample; choose",
    "gemma3n_text": "its hidden states cannot be recorded .*; choose a model of another type",
    "llama4_text": "transformers replaces its Llama4TextExperts by other modules when it loads a quantized checkpoint",
}


@pytest.mark.parametrize("name", list(REFUSED))
def test_open_model_that_cannot_run_by_blocks_is_refused_before_weights_are_read(
    tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    zoo_model(name).save_pretrained(tmp_path)
    monkeypatch.setattr(SafetensorsCheckpoint, "read", pytest.fail)
    monkeypatch.setattr("omniq.models.source.open_tokenizer", pytest.fail)
    start = time.process_time()
    refused(tmp_path, REFUSED[name])
    assert time.process_time() - start < 2  # measured: 0.2 s


@pytest.mark.parametrize(
    ("config", "words"),
    [
        ({"model_type": "t5"}, "'t5' .* is an encoder-decoder, .*: choose a decoder-only model"),
        ({"model_type": "vit"}, "'vit' .* no causal language model of this type: choose a decoder-only model"),
    ],
)
def test_open_model_that_is_not_decoder_only_is_refused(tmp_path: Path, config: dict[str, str], words: str) -> None:
    zoo_model("llama").save_pretrained(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps(config))
    refused(tmp_path, words)


def test_own_forward_with_store_that_blocks_share_is_refused(tmp_path: Path) -> None:
    source = opened(tmp_path, "gemma4_text")
    whole = source._embedding_and_head

    def write(hidden: torch.Tensor, *args: object, shared_kv_states: dict[str, int], **kwargs: object) -> torch.Tensor:
        shared_kv_states["full_attention"] = 1
        return hidden

    with pytest.raises(NotByBlocks, match="its blocks read what other blocks store in shared_kv_states; choose"):
        whole.own_logits(tokens(1), CPU, {0: write})


def test_check_streaming_of_block_that_reads_the_model_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = opened(tmp_path, "stablelm")
    own = source.own_logits
    monkeypatch.setattr(source, "own_logits", lambda *args: own(*args) * 1.001)
    with pytest.raises(
        NotByBlocks, match=r"'stablelm' .* logits differ by 1.0e-03 from .*, and 1e-05 is allowed; choose"
    ):
        check_streaming(source, CPU)


def test_discovered_layout_groups_of_unreached_experts_follow_those_of_reached_ones() -> None:
    """Of four experts, the traced tokens reach numbers 1 and 2."""
    block = nn.Module()
    block.add_module("first", nn.Linear(32, 32))
    block.add_module("experts", nn.ModuleList(nn.ModuleDict({k: nn.Linear(32, 32) for k in "abc"}) for _ in range(4)))
    block.add_module("last", nn.Linear(32, 32))
    keys = {"first": 0, "experts.1.a": 1, "experts.1.b": 1, "experts.1.c": 2}
    keys |= {"experts.2.a": 1, "experts.2.b": 1, "experts.2.c": 3, "last": 4}
    traced = Trace(inputs={name: (key, 0, 0, 0) for name, key in keys.items()})
    experts = [(f"experts.{k}.a", f"experts.{k}.b") for k in range(4)] + [(f"experts.{k}.c",) for k in range(4)]
    assert groups_of(block, traced) == [("first",), *experts, ("last",)]
