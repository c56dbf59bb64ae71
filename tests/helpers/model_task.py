# SPDX-License-Identifier: Apache-2.0
"""All blocks of a tiny model, rounded to nearest, as a task of a stage of the whole model."""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from omniq.blocks.forward import Precision, propagate
from omniq.blocks.grids import scheme_grids, scheme_layout
from omniq.blocks.placement import ActivationPlacement
from omniq.calibration.model_task import ModelTask
from omniq.grid.affine import Grid
from omniq.grid.scheme import Scheme
from omniq.models.source import SourceModel
from omniq.quantizers.activations import StaticGrid
from omniq.storage.block_result import BlockResult, QuantizedLinear
from tests.helpers.tiny import save_tiny

CPU = torch.device("cpu")


@dataclass
class TinyModel:
    """A task, and what it was made of."""

    source: SourceModel
    scheme: Scheme
    tokens: Tensor
    results: list[BlockResult]
    task: ModelTask


def tiny_model_task(
    folder: Path,
    family: str = "llama",
    scheme: Scheme | None = None,
    samples: int = 3,
    held_out: int = 2,
    length: int = 10,
    dtype: str = "float32",
    precision: Precision | None = None,
    **overrides: Any,
) -> TinyModel:
    """A tiny model, rounded to nearest; static ranges of activations are -3 to 3."""
    scheme = scheme or Scheme("W3A16g16")
    source = SourceModel.open(save_tiny(folder, family, **overrides), dtype=dtype)
    tokens = torch.randint(0, 256, (samples + held_out, length), generator=torch.Generator().manual_seed(1))
    inputs, kwargs = source.embed(tokens, CPU)
    targets, results, more = inputs.clone(), [], {} if precision is None else {"precision": precision}
    task = ModelTask(
        block=lambda index: source.block(index, CPU),
        read=lambda index: results[index],
        layouts=[scheme_layout(source, scheme, index) for index in range(source.num_blocks)],
        inputs=inputs,
        targets=targets,
        held_out=held_out,
        kwargs=kwargs,
        head=lambda hidden: source.logits(hidden, CPU),
        vocabulary=source.config.get_text_config().vocab_size,
        device=CPU,
        export_dtype=scheme.export_dtype,
        placement=ActivationPlacement("device", CPU, folder),
        seed=3,
        activations=scheme.activations,
        **more,
    )
    for index in range(source.num_blocks):
        block = source.block(index, CPU)
        propagate(block, targets, kwargs[index], task.precision)
        tensors = {name: value.detach() for name, value in block.named_parameters()}
        linears = {
            name: _rounded(tensors.pop(f"{name}.weight"), grid, scheme)
            for name, grid in scheme_grids(source, scheme, index).items()
        }
        results.append(BlockResult(linears, tensors))
    return TinyModel(source, scheme, tokens, results, task)


def _rounded(weight: Tensor, grid: Grid, scheme: Scheme) -> QuantizedLinear:
    weight = weight.float()
    scale, zero_point = grid.fit(*grid.range(weight))
    linear = QuantizedLinear.of(grid, grid.quantize(weight, scale, zero_point), scale, zero_point)
    if not scheme.activations.static:
        return linear
    ends, bits = torch.tensor([-3.0, 3.0]), scheme.activations.inputs
    fixed = StaticGrid.fit(ends[0], ends[1], bits, scheme.activations.symmetric, scheme.export_dtype)
    return replace(linear, input=fixed)
