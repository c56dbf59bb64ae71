# SPDX-License-Identifier: Apache-2.0
"""Results of tiny blocks, rounded to nearest, and relative changes of them."""

from typing import Any

import torch
from torch import Tensor

from omniq.grid.affine import Grid
from omniq.models.families import family_of_type
from omniq.storage.block_result import BlockResult, Outliers, QuantizedLinear
from tests.helpers.tiny import tiny_block


def rounded_result(family: str, grid: Grid, dtype: torch.dtype = torch.float32, **overrides: Any) -> BlockResult:
    """The first block of a tiny model, each linear rounded to nearest; norms and biases in the dtype of a run."""
    block, _ = tiny_block(family, **overrides)
    tensors = {name: value.detach() for name, value in block.named_parameters()}
    linears = {}
    for name in family_of_type(family).layout(block, 0).linears:
        weight = tensors.pop(f"{name}.weight")
        scale, zero_point = grid.fit(*grid.range(weight))
        linears[name] = QuantizedLinear.of(grid, grid.quantize(weight, scale, zero_point), scale, zero_point)
    return BlockResult(linears, {name: value.to(dtype) for name, value in tensors.items()})


def some_outliers(rows: int) -> Outliers:
    """One weight of 2 in the first column of every row."""
    return Outliers(
        torch.arange(rows + 1, dtype=torch.int32),
        torch.zeros(rows, dtype=torch.int32),
        torch.full((rows,), 2.0, dtype=torch.float16),
    )


def random_changes(shapes: dict[str, tuple[int, ...]], size: float = 0.05, seed: int = 0) -> dict[str, Tensor]:
    """Relative changes of that size; those of codes are of the size of a step of the grid, and beyond its ends."""
    draw = torch.Generator().manual_seed(seed)
    factors = {key: 1.5 if key.endswith(":codes") else size for key in shapes}
    return {key: factors[key] * torch.randn(shape, generator=draw) for key, shape in shapes.items()}
