# SPDX-License-Identifier: Apache-2.0
"""A transform returns factors of weights and keeps the frozen matrices."""

import torch

from omniq.kernels.scaled_weight import ScaledWeight, materialize
from omniq.models.families.llama import LLAMA
from omniq.transforms.heads import Heads
from omniq.transforms.transform import Transform
from tests.helpers.tiny import tiny_block, tiny_layout


def test_transform_apply_factored_returns_factors_and_keeps_frozen_matrices() -> None:
    block, _ = tiny_block("llama")
    tensors = dict(block.named_parameters())
    equivalences = [each for each in LLAMA.equivalences if each.kind != "up_down"]
    transform = Transform(equivalences, Heads.of(block.self_attn.config), tensors)
    draw = torch.Generator().manual_seed(0)
    parameters = {name: torch.randn(shape, generator=draw) for name, shape in transform.shapes.items()}
    found = transform.apply_factored(tensors, parameters)
    factored = {name: value for name, value in found.items() if isinstance(value, ScaledWeight)}
    assert set(factored) == {f"{name}.weight" for name in tiny_layout("llama").linears} - {"mlp.down_proj.weight"}
    assert all(value.weight is tensors[name] for name, value in factored.items())
    assert found["mlp.down_proj.weight"] is tensors["mlp.down_proj.weight"]
    for name, value in transform.apply(tensors, parameters).items():
        assert torch.equal(materialize(found[name]), value)
