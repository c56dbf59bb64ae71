# SPDX-License-Identifier: Apache-2.0
"""Shared by the tests of omniq's own format: finished blocks with outliers, and the expected logits."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

from omniq.models.source import SourceModel
from omniq.storage.block_result import BlockResult, Outliers, QuantizedLinear
from tests.helpers.exported import WINDOWS

Q_PROJ = "model.layers.0.self_attn.q_proj"


def with_outliers(linear: QuantizedLinear, support: str, seed: int = 0) -> QuantizedLinear:
    """Random float16 values on 2 % of the weights, on two whole columns, or on none of them."""
    if support == "none":
        return linear
    generator = torch.Generator().manual_seed(seed)
    outputs, inputs = linear.codes.shape
    mask = torch.rand(outputs, inputs, generator=generator) < 0.02
    if support == "structured":
        mask = torch.zeros(outputs, inputs, dtype=torch.bool)
        mask[:, torch.randperm(inputs, generator=generator)[:2]] = True
    elif support == "empty":
        mask = torch.zeros_like(mask)
    return replace(linear, outliers=Outliers.from_dense(torch.randn(mask.shape, generator=generator) * mask))


def sparse(results: list[BlockResult], support: str) -> list[BlockResult]:
    def one(result: BlockResult, index: int) -> BlockResult:
        linears = {name: with_outliers(linear, support, index) for name, linear in result.linears.items()}
        return replace(result, linears=linears)

    return [one(result, index) for index, result in enumerate(results)]


def unquantized(source: SourceModel, index: int) -> BlockResult:
    """A block that a run has left as it was."""
    block = source.block(index, dtype=torch.float32)
    return BlockResult({}, {name: value.data for name, value in block.named_parameters()})


@torch.no_grad()
def logits(model: nn.Module) -> Tensor:
    return torch.cat([model(window[None]).logits for window in WINDOWS])


def expected_logits(source: SourceModel, results: list[BlockResult], dtype: torch.dtype) -> Tensor:
    """Of the stock model with weights worked out here: (q - z) s + outliers in float64, to float32, to dtype."""
    model = AutoModelForCausalLM.from_pretrained(source.folder, dtype=dtype).eval()
    for index, result in enumerate(results):
        state = {name: tensor.to(dtype) for name, tensor in result.tensors.items()}
        for name, linear in result.linears.items():
            width = linear.codes.shape[1] // linear.scale.shape[1]
            scale, zero = (part.double().repeat_interleave(width, 1) for part in (linear.scale, linear.zero_point))
            weight = (linear.codes.double() - zero) * scale
            if linear.outliers is not None:
                for row in range(len(weight)):
                    begin, end = linear.outliers.row_pointer[row : row + 2].tolist()
                    columns = linear.outliers.column[begin:end].long()
                    weight[row, columns] += linear.outliers.value[begin:end].double()
            state[f"{name}.weight"] = weight.float().to(dtype)
        model.get_submodule(source.block_name(index)).load_state_dict(state)
    return logits(model)


def edit_config(out: Path, **entries: Any) -> None:
    config = json.loads((out / "config.json").read_text())
    config["quantization_config"] |= entries
    (out / "config.json").write_text(json.dumps(config))


def edit_tensors(out: Path, **tensors: Tensor | None) -> None:
    file = out / "model.safetensors"
    changed = load_file(file) | {f"{Q_PROJ}.{name}": tensor for name, tensor in tensors.items()}
    save_file({name: tensor for name, tensor in changed.items() if tensor is not None}, file, metadata={"format": "pt"})
