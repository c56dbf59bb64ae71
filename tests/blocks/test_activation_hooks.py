# SPDX-License-Identifier: Apache-2.0
"""Activations of a running block: which inputs are quantized and how often; decoding equals a full forward."""

import json
import re
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from omniq.blocks import activation_hooks
from omniq.blocks.activation_hooks import SampleLength, SharedInput, attach_all, check_attention, quantized_activations
from omniq.blocks.forward import call_block
from omniq.cli.command import main
from omniq.data import Evaluation, LocalText
from omniq.errors import UserError
from omniq.evaluate.perplexity import evaluate_model
from omniq.grid.affine import Grid
from omniq.grid.scheme import Activations
from omniq.models.layout import Layout
from omniq.quantizers.activations import quantize_tokens
from omniq.storage.block_result import QuantizedLinear
from omniq.transforms.heads import Heads
from tests.helpers.opening import SMOL, needs_smol
from tests.helpers.runs import configuration, omniquant, write_config, write_run, write_text
from tests.helpers.tiny import tiny_block, tiny_layout, tiny_model

FAMILIES = ["llama", "qwen3", "opt"]


def own_attention(block: nn.Module, x: Tensor, kwargs: dict[str, Any], given: Activations) -> Tensor:
    """A LLaMA block written out in float32 torch, with all quantizers in place."""
    attention = block.self_attn
    q8 = lambda value, bits: value if bits == 16 else quantize_tokens(value, bits, given.symmetric)  # noqa: E731
    hidden = q8(block.input_layernorm(x), given.inputs)
    heads = lambda y: y.unflatten(-1, (-1, attention.head_dim)).transpose(1, 2)  # noqa: E731
    q, k, v = (heads(each(hidden)) for each in (attention.q_proj, attention.k_proj, attention.v_proj))
    cos, sin = kwargs["position_embeddings"]
    turn = lambda y: y * cos + torch.cat([-y.chunk(2, -1)[1], y.chunk(2, -1)[0]], -1) * sin  # noqa: E731
    q, k, v = q8(turn(q), given.queries), q8(turn(k), given.keys_values), q8(v, given.keys_values)
    repeat = q.shape[1] // k.shape[1]
    k, v = k.repeat_interleave(repeat, 1), v.repeat_interleave(repeat, 1)
    scores = q @ k.mT * attention.scaling + torch.full((x.shape[1],) * 2, -torch.inf).triu(1)
    mixed = (scores.softmax(-1) @ v).transpose(1, 2).flatten(-2)
    x = x + attention.o_proj(q8(mixed, given.inputs))
    hidden = q8(block.post_attention_layernorm(x), given.inputs)
    gated = nn.functional.silu(block.mlp.gate_proj(hidden)) * block.mlp.up_proj(hidden)
    return x + block.mlp.down_proj(q8(gated, given.inputs))


def test_shared_input_after_last_linear_is_released() -> None:
    """Otherwise the inputs of all linears of a model would stay in memory at once."""
    first, last = nn.Linear(8, 8), nn.Linear(8, 8)
    shared = SharedInput(Activations(8), None, last, SampleLength())
    x = torch.randn(3, 8)
    given = weakref.ref(x)
    made = shared(first, (x,))[0]
    assert shared(last, (x,))[0] is made
    del x
    assert given() is None


GIVEN = [Activations(8), Activations(4, 4, 4), Activations(16, 16, 4), Activations(6, 6, 8, True)]


@pytest.mark.parametrize("given", GIVEN)
@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
@torch.no_grad()
def test_quantized_block_equals_block_written_out(given: Activations, implementation: str) -> None:
    block, kwargs = tiny_block("llama")
    block.self_attn.config._attn_implementation = implementation
    if implementation == "eager":
        kwargs = {**kwargs, "attention_mask": torch.full((1, 1, 16, 16), -torch.inf).triu(1)}
    x = torch.randn(2, 16, 64, generator=torch.Generator().manual_seed(0))
    plain = call_block(block, x, kwargs)
    with quantized_activations(block, tiny_layout("llama"), given):
        found = call_block(block, x, kwargs)
    # a value on a tie may go the other way where sums differ in their last bit
    assert (found - own_attention(block, x, kwargs, given)).norm() / found.norm() < 2e-3  # measured up to 4e-4
    assert not torch.equal(found, plain)
    assert torch.equal(call_block(block, x, kwargs), plain)  # everything is taken off again
    assert block.self_attn.config._attn_implementation == implementation


@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_quantized_block_shared_input_is_quantized_once(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[tuple[int, ...]] = []

    def counting(x: Tensor, *how: Any) -> Tensor:
        seen.append(tuple(x.shape))
        return quantize_tokens(x, *how)

    monkeypatch.setattr(activation_hooks, "quantize_tokens", counting)
    block, kwargs = tiny_block(family)
    x = torch.randn(1, 16, 64)
    with quantized_activations(block, tiny_layout(family), Activations(4)):
        call_block(block, x, kwargs)
        assert len(seen) == len(tiny_layout(family).groups)
        call_block(block, x, kwargs)  # the same tensor again is quantized again: nothing is held in between
        assert len(seen) == 2 * len(tiny_layout(family).groups)


@torch.no_grad()
def test_finished_block_inputs_of_kept_linears_stay_unquantized() -> None:
    block, kwargs = tiny_block("llama")
    layout = tiny_layout("llama")
    linear = QuantizedLinear.of(Grid(4), torch.zeros(2, 2), torch.ones(2, 1), torch.zeros(2, 1))
    finished = {name: linear for name in layout.linears if name not in ("self_attn.v_proj", "mlp.down_proj")}
    seen: dict[str, Tensor] = {}
    with quantized_activations(block, layout, Activations(4), finished):
        for name in layout.linears:
            hook = lambda module, args, name=name: seen.update({name: args[0]})  # noqa: E731
            block.get_submodule(name).register_forward_pre_hook(hook)
        call_block(block, torch.randn(1, 16, 64), kwargs)
    distinct = {name: len(tensor[0, 0].unique()) for name, tensor in seen.items()}
    assert {name for name, values in distinct.items() if values > 16} == {"self_attn.v_proj", "mlp.down_proj"}


@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_attached_model_with_cache_token_by_token_equals_full_forward(family: str) -> None:
    model = tiny_model(family)
    attach_all(((block, tiny_layout(family), None) for block in model.get_decoder().layers), Activations(4, 4, 4))
    tokens = torch.randint(0, 256, (2, 12), generator=torch.Generator().manual_seed(4))
    whole = model(tokens, use_cache=False).logits
    cache, parts = None, []
    for token in tokens.split(1, dim=1):
        step = model(token, past_key_values=cache, use_cache=True)
        cache = step.past_key_values
        parts.append(step.logits)
    error = (torch.cat(parts, 1) - whole).norm() / whole.norm()
    assert error < 1e-5  # measured 3e-7 (sums in another order), where no value lies on a tie


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize(("first", "then"), [("eager", "sdpa"), ("sdpa", "eager")])
@torch.no_grad()
def test_attention_implementation_chosen_later_gives_same_logits(family: str, first: str, then: str) -> None:
    """The mask depends on the config of the model at the time of the call; it must stay causal."""
    logits = []
    tokens = torch.randint(0, 256, (2, 12), generator=torch.Generator().manual_seed(4))
    for start in (first, then):
        model = tiny_model(family)
        model.set_attn_implementation(start)
        layers = model.get_decoder().layers
        detach = attach_all(((block, tiny_layout(family), None) for block in layers), Activations(8, 8, 8))
        model.set_attn_implementation(then)
        logits.append(model(tokens, use_cache=False).logits)
    assert (logits[0] - logits[1]).norm() / logits[1].norm() < 1e-6  # measured 0.0
    tokens[:, -1] += 1
    assert torch.equal(model(tokens, use_cache=False).logits[:, :-1], logits[1][:, :-1])
    detach()
    assert all(block.self_attn.config is model.config for block in layers)


@torch.no_grad()
def test_attention_implementation_registered_sees_own_name(monkeypatch: pytest.MonkeyPatch) -> None:
    """Flash attention reads this name from the config of the module."""
    seen: list[str] = []

    def known(module: Any, query: Tensor, key: Tensor, value: Tensor, *args: Any, **kwargs: Any) -> Any:
        seen.append(module.config._attn_implementation)
        return ALL_ATTENTION_FUNCTIONS["sdpa"](module, query, key, value, *args, **kwargs)

    monkeypatch.setitem(ALL_ATTENTION_FUNCTIONS._global_mapping, "known", known)
    block, kwargs = tiny_block("llama")
    block.self_attn.config._attn_implementation = "known"
    with quantized_activations(block, tiny_layout("llama"), Activations(8, 8, 8)):
        call_block(block, torch.randn(1, 16, 64), kwargs)
    assert seen == ["known"]


@torch.no_grad()
def test_quantized_block_under_autocast_quantizes_in_dtype_of_product() -> None:
    """Under autocast a LayerNorm returns float32; in a deployed bfloat16 model it returns bfloat16."""
    block, kwargs = tiny_block("opt")
    seen: list[torch.dtype] = []
    with quantized_activations(block, tiny_layout("opt"), Activations(8)), torch.autocast("cpu", torch.bfloat16):
        block.fc1.register_forward_pre_hook(lambda module, args: seen.append(args[0].dtype))
        call_block(block, torch.randn(1, 16, 64), kwargs)
    assert seen == [torch.bfloat16]


def test_check_attention_of_unreachable_family_is_refused() -> None:
    bloom = Layout("bloom", (("mlp.dense",),), Heads(1, 1))
    check_attention(bloom, Activations(8))
    words = "attention of bloom does not call transformers' attention interface.*use a scheme without KV bits"
    with pytest.raises(UserError, match=words):
        check_attention(bloom, Activations(8, 16, 8))


# -- whole runs -----------------------------------------------------------------------------------------------------


SCHEMES: list[dict[str, Any]] = [
    {"name": "W6A6"},
    {"name": "W4A4", "dtype": "bfloat16"},
    {"name": "W8A8", "activation_range": "tensor", "activation_symmetric": True},
    {"name": "W4A8g16", "activation_range": "tensor"},
]


@pytest.mark.parametrize("scheme", SCHEMES, ids=lambda scheme: scheme["name"])
def test_exported_model_reloaded_has_measured_perplexity(
    scheme: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    """The model is learned with a transform, exported, verified, and opened by transformers alone."""
    evaluation = configuration(tmp_path)["evaluation"] | {"max_windows": 100}
    stages = [omniquant(transform={"alpha": 0.5})]
    assert main(write_run(tmp_path, scheme=scheme, stages=stages, evaluation=evaluation)) == 0
    said = re.sub(r"\s+", " ", capsys.readouterr().out)
    assert "logits through transformers within 0.0e+00 of omniq's; perplexity of 24 tokens" in said
    ours = json.loads((tmp_path / "run" / "perplexity.json").read_text())["models"]["omniq"]["perplexity"]
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder = tmp_path / "run" / "model"
    model = AutoModelForCausalLM.from_pretrained(folder)
    text = Evaluation(LocalText(str(tmp_path / "text.txt")), length=24, max_windows=100)
    theirs = evaluate_model(model, text.sequences(AutoTokenizer.from_pretrained(folder))).perplexity
    assert theirs == pytest.approx(ours, rel=1e-6)  # measured 0.0: both compute in the dtype of the checkpoint
    assert model.config.attention_bias  # the shift from values to output is stored there


@pytest.mark.parametrize(
    ("family", "scheme", "words"),
    [
        ("opt", {"name": "W8A8"}, "a range for each token in fc1, fc2 of opt, .* scheme.activation_range to tensor"),
        ("llama", {"name": "W4A4KV4"}, "does not support a dynamic KV cache of 4 bits: use KV16, or format omniq"),
        ("llama", {"name": "W4A4", "queries": True}, "does not support quantized queries: set scheme.queries to false"),
    ],
)
def test_quantize_unexportable_scheme_is_refused_before_run(
    family: str, scheme: dict[str, Any], words: str, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    assert main(write_run(tmp_path, family, scheme=scheme)) == 2
    assert re.search(words, capsys.readouterr().err)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("family", ["llama", "opt"])
def test_quantize_with_queries_and_keys_quantized_runs_without_export(family: str, tmp_path: Path) -> None:
    scheme = {"name": "W4A4KV4", "queries": True}
    stages = [omniquant(transform={}, augmented_loss=True)]
    assert main(write_run(tmp_path, family, scheme=scheme, stages=stages, export={"format": "none"})) == 0
    models = json.loads((tmp_path / "run" / "perplexity.json").read_text())["models"]
    assert models["omniq"]["perplexity"] != models["full precision"]["perplexity"]


def test_quantize_some_blocks_leaves_others_in_full_precision(tmp_path: Path) -> None:
    """The run verifies its export: a runtime quantizes the inputs of quantized linears only."""
    assert main(write_run(tmp_path, scheme={"name": "W4A4"}, blocks=1)) == 0


@needs_smol
@pytest.mark.slow
def test_real_model_reloaded_has_measured_perplexity(tmp_path: Path) -> None:
    write_text(tmp_path / "text.txt")
    run = configuration(tmp_path, model={"path": SMOL}, scheme={"name": "W4A4"}, export={"verify": False})
    run |= {"stages": [{"class_path": "omniq.stages.SmoothQuant"}]}
    run["evaluation"] |= {"length": 128}
    assert main(write_config(tmp_path / "run.yaml", run)) == 0
    ours = json.loads((tmp_path / "run" / "perplexity.json").read_text())["models"]["omniq"]["perplexity"]
    given = ["--model.path", str(tmp_path / "run" / "model"), "--evaluation", json.dumps(run["evaluation"])]
    assert main(["evaluate", *given, "--device", "cpu", "--out", str(tmp_path / "theirs.json")]) == 0
    (theirs,) = json.loads((tmp_path / "theirs.json").read_text())["results"].values()
    assert theirs["perplexity"] == pytest.approx(ours, rel=1e-5)  # measured 0.0; in float32 it is 12 % off
