# SPDX-License-Identifier: Apache-2.0
"""Equivalent transforms with random parameters keep the output of a block in float64."""

from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from omniq.transforms import equivalences
from omniq.transforms.equivalences import NormToLinears, QueryKey, UpToDown
from omniq.transforms.heads import Heads
from omniq.transforms.let import KINDS
from omniq.transforms.linear_ref import LinearRef
from omniq.transforms.transform import Transform
from tests.helpers.float64_block import BLOCKS, Float64Block, float64_block, random_parameters


@pytest.mark.parametrize("label", BLOCKS)
@settings(max_examples=5, deadline=None)
@given(seed=st.integers(0, 1000))
def test_transform_random_keeps_output(label: str, seed: int) -> None:
    block = float64_block(label)
    assert block.change(block.equivalences, seed) < 1e-9  # measured 7e-16


@pytest.mark.parametrize("label", BLOCKS)
def test_transform_single_equivalence_keeps_output_and_moves_its_tensors(label: str) -> None:
    block = float64_block(label)
    for equivalence in block.equivalences:
        assert block.change((equivalence,)) < 1e-9
        transform = Transform((equivalence,), block.heads, block.tensors)
        transformed = transform.apply(block.tensors, random_parameters(transform))
        changed = {name for name, value in transformed.items() if not torch.equal(value, block.tensors[name])}
        norms = isinstance(equivalence, QueryKey) and equivalence.query_norm is not None
        names = {"query_norm", "key_norm"} if norms else {"norm", "value", "output", "query", "key", "up", "down"}
        ends = {LinearRef.of(value).name for name, value in vars(equivalence).items() if name in names}
        assert {name.rpartition(".")[0] for name in changed} == ends | set(getattr(equivalence, "linears", ()))


def test_transform_of_row_slice_changes_its_rows_only() -> None:
    """The fused projections of Phi-3 have slices for 4 query heads and 2 KV heads of 16 channels."""
    block = float64_block("phi3")
    rows = {"value_output": range(96, 128), "query_key": range(0, 96), "up_down": range(128, 256)}
    for equivalence in block.equivalences[2:]:
        transform = Transform((equivalence,), block.heads, block.tensors)
        transformed = transform.apply(block.tensors, random_parameters(transform))
        name = f"{equivalence.divided.name}.weight"
        changed = (transformed[name] != block.tensors[name]).any(1).nonzero().flatten()
        assert changed.tolist() == list(rows[equivalence.kind])
    keys = Transform(block.equivalences, block.heads, block.tensors).equivalences
    assert {"self_attn/qkv_proj:96-128", "self_attn/qkv_proj:0-64", "mlp/gate_up_proj:128-256"} < set(keys)


def test_transform_shift_of_row_slice_changes_its_biases_only() -> None:
    """As in a Phi-3 with biases: one bias exists, the other one is created."""
    block = float64_block("phi3")
    bias = torch.randn(128, dtype=torch.float64)
    tensors = block.tensors | {"self_attn.qkv_proj.bias": bias}
    (value,) = (each for each in block.equivalences if each.kind == "value_output")
    transform = Transform((value,), block.heads, tensors, {"self_attn.o_proj"})
    parameters = random_parameters(transform)
    transformed = transform.apply(tensors, parameters)
    created = Transform((value,), block.heads, block.tensors, {"self_attn.qkv_proj", "self_attn.o_proj"})
    alone = created.apply(block.tensors, parameters)["self_attn.qkv_proj.bias"]
    assert torch.equal(transformed["self_attn.qkv_proj.bias"][:96], bias[:96])
    assert not alone[:96].any()
    key = "self_attn/qkv_proj:96-128"
    scale, shift = parameters[f"{key}/log_scale"].exp(), parameters[f"{key}/shift"]
    torch.testing.assert_close(transformed["self_attn.qkv_proj.bias"][96:], (bias[96:] - shift) / scale)
    torch.testing.assert_close(alone[96:], -shift / scale)
    before, after = block.run(tensors), block.run(transformed)
    assert ((after - before).norm() / before.norm()).item() < 1e-9


@pytest.mark.parametrize("power", [1, 2])
def test_up_to_down_with_power_of_relu_keeps_output(power: int) -> None:
    tensors = {"up.weight": torch.randn(12, 6).double(), "up.bias": torch.randn(12).double()}
    tensors |= {"down.weight": torch.randn(6, 12).double()}
    hidden = torch.randn(5, 6).double()

    def run(tensors: dict[str, Tensor]) -> Tensor:
        return (hidden @ tensors["up.weight"].T + tensors["up.bias"]).relu() ** power @ tensors["down.weight"].T

    transform = Transform((UpToDown("up", "down", power=power),), Heads(1, 1), tensors)
    transformed = transform.apply(tensors, random_parameters(transform))
    assert not torch.equal(transformed["up.weight"], tensors["up.weight"])
    torch.testing.assert_close(run(transformed), run(tensors), rtol=1e-9, atol=1e-12)


def test_transform_plain_norm_of_gemma_changes_output() -> None:
    block = float64_block("gemma")
    norm = block.equivalences[0]
    assert isinstance(norm, NormToLinears)
    assert block.change((NormToLinears(norm.norm, norm.linears),)) > 1e-1


@pytest.mark.parametrize("label", ["llama 3 of 9", "llama 9 of 9", "qwen3"])
def test_transform_scale_splitting_rotary_pair_changes_output(label: str) -> None:
    """This is the published transform; it shows that the tests above can fail."""
    block = float64_block(label)
    (tied,) = (each for each in block.equivalences if isinstance(each, QueryKey))
    untied = QueryKey(tied.query, tied.key, None, tied.query_norm, tied.key_norm)
    assert block.change((untied,)) > 1e-2


def test_transform_shifts_exist_where_bias_can_be_stored() -> None:
    for label, shifted in {
        "opt": {"self_attn_layer_norm", "final_layer_norm", "self_attn/v_proj"},
        "llama with biases": {"self_attn/v_proj"},
        "llama 3 of 9": set(),
        "qwen2": set(),
    }.items():
        block = float64_block(label)
        transform = Transform(block.equivalences, block.heads, block.tensors)
        assert {name.removesuffix("/shift") for name in transform.shapes if name.endswith("/shift")} == shifted
        assert (
            set(transform.unshifted)
            == {key for key, each in transform.equivalences.items() if each.kind in ("norm", "value_output")} - shifted
        )
        assert not any(
            name.endswith("/shift")
            for name in Transform(block.equivalences, block.heads, block.tensors, shift=False).shapes
        )
    block = float64_block("qwen2")
    reasons = Transform(block.equivalences, block.heads, block.tensors).unshifted
    assert reasons["self_attn/v_proj"] == "no shift from self_attn.v_proj: self_attn.o_proj cannot store a bias"
    assert "input_layernorm" in reasons["input_layernorm"]


def test_transform_shift_creates_storable_biases() -> None:
    """A LLaMA without biases gets them; its stock module with ``attention_bias`` can store them."""
    bare, room = Float64Block("llama"), Float64Block("llama", attention_bias=True)
    transform = Transform(bare.equivalences, bare.heads, bare.tensors, {"self_attn.v_proj", "self_attn.o_proj"})
    assert "self_attn/v_proj/shift" in transform.shapes
    moved = transform.apply(bare.tensors, random_parameters(transform))
    assert {"self_attn.v_proj.bias", "self_attn.o_proj.bias"} == set(moved) - set(bare.tensors)
    zeros = {name: torch.zeros_like(value) for name, value in room.tensors.items() if name.endswith("bias")}
    before = bare.run(bare.tensors)
    assert ((room.run(zeros | moved) - before).norm() / before.norm()).item() < 1e-9


@pytest.mark.parametrize("layout", ["half", "interleaved", None])
@pytest.mark.parametrize("rotary", [None, 4])
def test_tied_channels_scale_commutes_with_rotary_embedding(layout: str | None, rotary: int | None) -> None:
    channels, turned = 8, rotary or 8
    tied = Heads(1, 1, rotary).tied_channels(channels, layout)
    assert sorted(set(tied.tolist())) == list(range(int(tied.max()) + 1))
    assert int(tied.max()) + 1 == (channels if layout is None else channels - turned // 2)
    first = torch.arange(turned // 2) if layout == "half" else 2 * torch.arange(turned // 2)
    second = first + (turned // 2 if layout == "half" else 1)

    def turn(x: Tensor) -> Tensor:
        if layout is None:
            return x
        out, angle = x.clone(), torch.linspace(0.3, 2.0, turned // 2, dtype=torch.float64)
        out[..., first] = x[..., first] * angle.cos() - x[..., second] * angle.sin()
        out[..., second] = x[..., second] * angle.cos() + x[..., first] * angle.sin()
        return out

    x = torch.randn(5, channels, dtype=torch.float64)
    scale = torch.rand(int(tied.max()) + 1, dtype=torch.float64)[tied] + 0.5
    torch.testing.assert_close(turn(x * scale), turn(x) * scale, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("wide", [False, True])
def test_query_key_with_norms_scales_norms(wide: bool) -> None:
    """The norm spans one head (Qwen3) or all channels (OLMo 2); there are 4 query heads and 2 KV heads."""
    heads, size = Heads(4, 2), 6
    names = {"q": 4 * size, "k": 2 * size}
    tensors = {f"{name}.weight": torch.randn(width, 10).double() for name, width in names.items()}
    tensors |= {f"{name}_norm.weight": torch.rand(width if wide else size).double() for name, width in names.items()}
    transform = Transform((QueryKey("q", "k", "half", "q_norm", "k_norm"),), heads, tensors)
    assert transform.shapes == {"q/log_scale": (2, 3) if wide else (3,)}
    hidden = torch.randn(5, 10).double()

    def scores(tensors: dict[str, Tensor]) -> Tensor:
        sides = []
        for name, count in (("q", 4), ("k", 2)):
            x = hidden @ tensors[f"{name}.weight"].T
            x = x if wide else x.unflatten(1, (count, size))
            x = x / x.square().mean(-1, keepdim=True).sqrt() * tensors[f"{name}_norm.weight"]
            sides.append(x.reshape(5, count, size).transpose(0, 1))
        return sides[0] @ sides[1].repeat_interleave(2, 0).mT  # [H, 5, 5]

    moved = transform.apply(tensors, random_parameters(transform))
    assert not torch.equal(moved["q_norm.weight"], tensors["q_norm.weight"])
    torch.testing.assert_close(scores(moved), scores(tensors), rtol=1e-9, atol=1e-12)


def test_transform_has_gradient_in_weights_but_not_in_output() -> None:
    block = float64_block("opt")
    transform = Transform(block.equivalences, block.heads, block.tensors)
    parameters = {name: value.requires_grad_() for name, value in random_parameters(transform).items()}
    moved = transform.apply(block.tensors, parameters)
    output = block.run(moved)
    flat = torch.autograd.grad((output * torch.randn_like(output)).sum(), list(parameters.values()), retain_graph=True)
    steep = torch.autograd.grad(sum(value.square().sum() for value in moved.values()), list(parameters.values()))
    for name, small, large in zip(parameters, flat, steep, strict=True):
        assert small.norm() < 1e-9 * large.norm(), name  # measured 1e-13


def test_transform_parameters_start_at_identity_in_float32() -> None:
    block = float64_block("qwen3")
    half = {name: value.half() for name, value in block.tensors.items()}
    transform = Transform(block.equivalences, block.heads, half)
    parameters = transform.parameters()
    assert isinstance(parameters, nn.ParameterDict)
    assert {name: tuple(value.shape) for name, value in parameters.items()} == transform.shapes
    moved = transform.apply(half, parameters)
    assert moved["self_attn.o_proj.weight"].dtype == torch.float32
    assert all(torch.equal(moved[name].double(), half[name].double()) for name in half)
    again = transform.parameters()
    again.load_state_dict(parameters.state_dict())


def test_transform_scales_stay_positive_and_finite() -> None:
    block = float64_block("llama 3 of 9")
    transform = Transform(block.equivalences, block.heads, block.tensors)
    for far, most in ((-1e6, -10.0), (1e6, 10.0)):
        moved = transform.apply(
            block.tensors, {name: torch.full(shape, far) for name, shape in transform.shapes.items()}
        )
        assert all(value.isfinite().all() and (value != 0).all() for value in moved.values())
        kept = block.tensors["input_layernorm.weight"] / moved["input_layernorm.weight"]
        torch.testing.assert_close(kept.log(), torch.full_like(kept, most))


def test_heads_of_config_reads_counts_and_rotary() -> None:
    config = SimpleNamespace(hidden_size=72, num_attention_heads=9, num_key_value_heads=3)
    assert Heads.of(config) == Heads(9, 3)
    config.rope_parameters = {"partial_rotary_factor": 0.5}
    assert Heads.of(config) == Heads(9, 3)
    assert Heads.of(config, partial_rotary=True) == Heads(9, 3, 4)
    assert Heads.of(SimpleNamespace(hidden_size=64, num_attention_heads=4)) == Heads(4, 4)


def test_kinds_name_every_equivalence() -> None:
    """The settings list the kinds themselves, because they do not import torch."""
    assert sorted(KINDS) == sorted(getattr(equivalences, name).kind for name in equivalences.__all__)
