# SPDX-License-Identifier: Apache-2.0
"""SpQR by its definition in plain numbers, one weight at a time."""

import itertools
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from omniq.grid.affine import Grid
from omniq.grid.quantized_scales import QuantizedScales
from omniq.solvers.solution import LayerSolution


def stored(scale: Any) -> float:
    """A scale as float16 holds it; torch goes there by way of float32."""
    return float(max(np.float16(np.float32(scale)), np.float16(2**-24)))


def fit_range(weights: Sequence[Any], grid: Grid, real: Any) -> tuple[Any, float, float]:
    """Low end, scale and zero point of some weights, computed in ``real``."""
    lo, hi = real(min(0, *weights)), real(max(0, *weights))
    if grid.symmetric:
        return lo, stored(real(2) * max(-lo, hi) / real(grid.max_code)), 2 ** (grid.bits - 1)
    scale = stored((hi - lo) / real(grid.max_code))
    return lo, scale, float(min(max(np.round(-lo / real(scale)), 0), grid.max_code))


def value(w: float, scale: float, zero: float, grid: Grid) -> tuple[int, float]:
    """Code and value of a weight."""
    code = min(max(round(w / scale) + zero, 0), grid.max_code)
    return int(code), (code - zero) * scale


def cost(weights: Sequence[float], d: Sequence[float], scale: float, zero: float, grid: Grid) -> float:
    return sum(dj * (w - value(w, scale, zero, grid)[1]) ** 2 for w, dj in zip(weights, d, strict=True))


def gain(weights: list[float], d: list[float], j: int, grid: Grid) -> float:
    """What leaving out weight ``j`` is worth."""
    rest, of_rest = weights[:j] + weights[j + 1 :], d[:j] + d[j + 1 :]
    before = cost(weights, d, *fit_range(weights, grid, np.float64)[1:], grid)
    return before - (cost(rest, of_rest, *fit_range([0, *rest], grid, np.float64)[1:], grid) if rest else 0)


def between(least: Any, greatest: Any, code: int, bits: int, real: Any = np.float32) -> Any:
    top = 2**bits - 1
    return (real(least) * real(top - code) + real(greatest) * real(code)) / real(top)


def second_level(
    rows: list[list[float]], d: list[float], grid: Grid, second: QuantizedScales
) -> list[tuple[float, float]]:
    """Scale and zero point of one group in each row of one run."""
    first = [fit_range(row, grid, np.float32) for row in rows]
    most = max(scale for _, scale, _ in first)
    first = [(lo, scale if any(row) else most, zero) for row, (lo, scale, zero) in zip(rows, first, strict=True)]
    scales, zeros = [scale for _, scale, _ in first], [zero for *_, zero in first]
    ends, zero_ends = (min(scales), max(scales)), (min(zeros), max(zeros))
    codes = range(2**second.zero_bits) if second.zero_bits else ()
    allowed = [float(np.round(between(*zero_ends, code, second.zero_bits))) for code in codes]
    chosen = []
    for row, (lo, own, zero) in zip(rows, first, strict=True):
        best = (np.inf, own, zero)
        for code in range(2**second.scale_bits):
            scale = own
            if second.scale_bits and own not in ends:
                scale = float(np.float16(between(*ends, code, second.scale_bits)))
            for shift in (0,) if grid.symmetric else (0, -1, 1):
                z = (
                    zero
                    if grid.symmetric
                    else float(min(max(np.round(-lo / np.float32(scale)) + shift, 0), grid.max_code))
                )
                if second.zero_bits:
                    z = zero if zero in zero_ends else allowed[int(np.argmin([abs(x - z) for x in allowed]))]
                if (now := cost(row, d, scale, z, grid)) < best[0]:
                    best = (now, scale, z)
        chosen.append(best[1:])
    return chosen


def definition(
    weight: Tensor, gram: Tensor, grid: Grid, threshold: float, damping: float, act_order: bool
) -> LayerSolution:
    """Algorithm 1 with the inverse reduced column by column, without a Cholesky factor."""
    (outputs, inputs), size = weight.shape, weight.shape[1] // grid.groups(weight.shape[1])
    diagonal = gram.diagonal()
    dead = diagonal <= 1e-8 * diagonal.mean()
    damped = gram * ~dead * ~dead[:, None] + torch.where(dead, 1.0, damping * diagonal.mean()).diag()
    groups = [list(range(start, start + size)) for start in range(0, inputs, size)]
    if act_order:
        groups = [sorted(group, key=lambda j: -float(diagonal[j])) for group in groups]
        groups.sort(key=lambda group: -float(diagonal[group].sum()))
    order = [j for group in groups for j in group]
    inverses, inverse = {}, torch.linalg.inv(damped)
    for j in order:  # the inverse of what is not visited yet, when j's turn comes
        inverses[j] = inverse[j] / inverse[j, j], float(inverse[j, j])
        inverse = inverse - torch.outer(inverse[:, j], inverse[j]) / inverse[j, j]
        inverse[j, j] = 1.0
    d = {j: 0.0 if dead[j] else 1 / inverses[j][1] for j in order}
    tau = threshold * sum(float(weight[:, j].square().mean()) * d[j] for j in order) / inputs if threshold else np.inf
    w, codes, sparse = weight.clone(), torch.zeros(outputs, inputs), torch.zeros_like(weight)
    scale, zero = torch.zeros(2, outputs, len(groups), dtype=torch.float64)
    for group in groups:
        of_group, rows = [d[j] for j in group], []
        for row in w[:, group].tolist():
            rows.append([0.0 if gain(row, of_group, j, grid) > tau else row[j] for j in range(size)])
        run = grid.second.rows if grid.second else outputs
        parts = [rows[start : start + run] for start in range(0, outputs, run)]
        if grid.second:
            chosen = [pair for part in parts for pair in second_level(part, of_group, grid, grid.second)]
        else:
            chosen = [fit_range(row, grid, np.float32)[1:] for row in rows]
        for (o, (s, z)), j in itertools.product(enumerate(chosen), group):
            scale[o, j // size], zero[o, j // size] = s, z
        for j in group:
            for o, (s, z) in enumerate(chosen):
                code, near = value(float(w[o, j]), s, z, grid)
                missed = float(w[o, j]) - near
                kept = float(np.float16(missed)) if missed**2 * d[j] > tau else 0.0
                codes[o, j], sparse[o, j] = code, kept
                w[o] -= (missed - kept) * inverses[j][0]
    return LayerSolution(codes.to(torch.uint8), scale, zero, sparse if threshold else None)
