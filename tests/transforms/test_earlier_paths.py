# SPDX-License-Identifier: Apache-2.0
"""Modules that have moved are found under their earlier paths, with a warning that names the new one."""

import importlib
import sys

import pytest
import torch

from omniq.models.families.llama import LLAMA
from omniq.transforms.let import block_transform
from tests.helpers.tiny import HALF_TURNED, tiny_model


@pytest.mark.parametrize(
    ("earlier", "now", "name"),
    [
        ("omniq.models.llama", "omniq.models.families.llama", "LLAMA"),
        ("omniq.stages.transform", "omniq.calibration.fuse", "fuse"),
        ("omniq.stages.transform", "omniq.calibration.fuse", "input_ranges"),
    ],
)
def test_module_imported_under_earlier_path_warns_and_holds_same_objects(earlier: str, now: str, name: str) -> None:
    sys.modules.pop(earlier, None)
    with pytest.warns(DeprecationWarning, match=f"{earlier} has moved: import {now}"):
        module = importlib.import_module(earlier)
    assert getattr(module, name) is getattr(importlib.import_module(now), name)


@torch.no_grad()
def test_earlier_transform_of_llama_with_partial_rotary_factor_keeps_output() -> None:
    """LLaMA's code in transformers turns the whole head, whatever ``partial_rotary_factor`` says."""
    model = tiny_model("llama", **HALF_TURNED)
    ids = torch.arange(40).reshape(2, 20)
    before, generator = model(ids).logits, torch.Generator().manual_seed(3)
    for block in model.model.layers:
        with pytest.warns(DeprecationWarning, match="use omniq.calibration.fuse.block_transform"):
            transform = block_transform(block, LLAMA, ["query_key"], False)
        values = {name: 0.8 * torch.randn(shape, generator=generator) for name, shape in transform.shapes.items()}
        assert values
        for name, value in transform.apply(dict(block.named_parameters()), values).items():
            block.get_parameter(name).copy_(value)
    change = float((model(ids).logits - before).abs().max() / before.abs().max())
    assert change < 1e-5  # measured: 1e-6
