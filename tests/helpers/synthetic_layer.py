# SPDX-License-Identifier: Apache-2.0
"""Layers that look like those of a language model, with fixed seeds, and the measure of their error.

Inputs have power-law factors, white noise, log-normal channel gains, a mean and 0.5 % channels twelve times as strong;
weights are Student-t(6) with log-normal row gains, stored in half precision. The numbers that the tests compare with
were measured on exactly these layers.

Shapes: ``o`` output features, ``i`` input features, ``G`` groups.
"""

from functools import cache

import numpy as np
import torch
from torch import Tensor

from omniq.grid.affine import Grid
from omniq.kernels.layer_problem import Problem, prepare
from omniq.kernels.matmul_precision import Precision
from omniq.quantizers.search import search_range


@cache
def make_layer(outputs: int, inputs: int, seed: int = 20240, tokens: int = 8192) -> tuple[Tensor, Tensor]:
    """Weights ``[o, i]`` and Gram matrix ``[i, i]``, both float64."""
    rng = np.random.default_rng([seed, outputs, inputs])
    weight = rng.standard_t(6, size=(outputs, inputs)) * 0.02 * np.exp(0.25 * rng.standard_normal((outputs, 1)))
    rank = min(inputs // 2, 384)
    factors = rng.standard_normal((inputs, rank)) * (np.arange(1, rank + 1) ** -0.6)
    x = rng.standard_normal((tokens, rank)) @ factors.T + 0.35 * rng.standard_normal((tokens, inputs))
    x += 0.5 * rng.standard_normal(inputs)
    x *= np.exp(0.4 * rng.standard_normal(inputs))
    x[:, rng.choice(inputs, size=max(3, inputs // 200), replace=False)] *= 12.0
    half = (0.5 * x).astype(np.float16).astype(np.float64)
    return torch.from_numpy(weight.astype(np.float16).astype(np.float64)), torch.from_numpy(half.T @ half)


def relative_error(weight: Tensor, approximation: Tensor, gram: Tensor) -> float:
    """``||W X - W^ X||^2 / ||W X||^2`` in float64."""
    weight, gram = weight.double(), gram.double()
    residual = weight - approximation.detach().double()
    return float(((residual @ gram) * residual).sum() / ((weight @ gram) * weight).sum())


def fit_grid(weight: Tensor, grid: Grid, second_moment: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
    """Scale, zero point ``[o, G]`` and group of each column ``[i]``, from min-max or, with ``second_moment``, searched.

    The last group is short where the group size does not divide the width.
    """
    outputs, inputs = weight.shape
    size = inputs if grid.group_size == -1 else grid.group_size
    missing = -inputs % size
    padded = torch.cat([weight, weight.new_zeros(outputs, missing)], 1)  # zeros change neither a range nor its error
    if second_moment is None:
        covered = grid.range(padded)
    else:
        covered = search_range(padded, grid, torch.cat([second_moment, second_moment.new_zeros(missing)]))
    return *grid.fit(*covered), torch.arange(inputs) // size


def dequantize(codes: Tensor, scale: Tensor, zero_point: Tensor, group_index: Tensor) -> Tensor:
    """``(q - z) s``, ``[o, i]``."""
    return (codes - zero_point[:, group_index]) * scale[:, group_index]


def uneven_problem(outputs: int, inputs: int, device: str, precision: Precision = "float32") -> tuple[Problem, Tensor]:
    """A layer whose inputs and rows differ by orders of magnitude, with a dead column."""
    weight, gram = make_layer(outputs, inputs, tokens=2 * inputs)
    generator = torch.Generator().manual_seed(1)
    uneven = torch.exp(2 * torch.randn(inputs, generator=generator, dtype=torch.float64))
    uneven[5] = 0
    gram = (gram * uneven * uneven[:, None]).float()
    weight = (weight * torch.exp(2 * torch.randn(outputs, 1, generator=generator, dtype=torch.float64))).float()
    scale, zero_point = Grid(3).fit(*Grid(3).range(weight))
    rounded = Grid(3).dequantize(Grid(3).quantize(weight, scale, zero_point), scale, zero_point)
    residual = (weight - rounded).to(device).t().contiguous()
    residual[5] = 0
    w, g, s, z = (each.to(device).float() for each in (weight, gram, scale, zero_point))
    return prepare(w, g, s, z, 3, precision=precision, block=64), residual
