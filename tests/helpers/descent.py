# SPDX-License-Identifier: Apache-2.0
"""Sweeps of coordinate descent: one sweep from given weights, and fused sweeps compared with those of torch."""

from typing import Any, NamedTuple

import torch
from torch import Tensor

from omniq.grid.affine import Grid
from omniq.kernels.coordinate_descent import keep_codes_, sweep_
from omniq.kernels.layer_problem import Problem, empty_codes, nearest, objective, prepare, to_residual_, to_values_
from tests.helpers.synthetic_layer import fit_grid, make_layer


def codes_of(problem: Problem, residual: Tensor) -> Tensor:
    """Nearest codes of ``W - D``, uint8 ``[i, o]``: the codes themselves after a rounded sweep."""
    return nearest(problem, residual, slice(None)).to(torch.uint8)


def missed_by(problem: Problem, before: Tensor, after: Tensor, rounded: bool) -> float:
    """How far the values of a sweep are from the best ones, given those left and right of them: in steps of the grid.

    Of rounded values, how far beyond half a step. Unlike equal codes this does not depend on how near a tie each is.
    """
    left = problem.gram.tril(-1)
    gradient = left @ after + (problem.gram - left) @ before
    scale, zero_point = problem.scale[problem.group_index], problem.zero_point[problem.group_index]
    best = (problem.target - before + gradient * problem.inverse[:, None]) / scale
    free = torch.full_like(best, not rounded, dtype=torch.bool)
    if problem.mask is not None:
        free |= problem.mask
    wanted = torch.where(free, best, best.clamp(-zero_point, problem.max_code - zero_point))
    missed = (wanted - (problem.target - after) / scale).abs() - torch.where(free, 0.0, 0.5)
    return float(missed[problem.inverse > 0].max())


def compare_backends(
    device: str, precision: str, outputs: int, inputs: int, bits: int, groups: int, masked: bool
) -> dict[str, Any]:
    """Three fused sweeps: codes and counts that differ from the torch version's, how far values and gains are off."""
    weight, gram = make_layer(outputs, inputs, tokens=400)
    gram = gram * (torch.arange(inputs) != 7) * (torch.arange(inputs) != 7)[:, None]  # one dead column
    scale, zero_point, _ = fit_grid(weight, Grid(bits, inputs // groups))
    mask = torch.rand(weight.shape, generator=torch.Generator().manual_seed(2)) < 0.03 if masked else None
    layer = [each.to(device) for each in (weight, gram.float(), scale, zero_point)]
    mask = None if mask is None else mask.to(device)
    problem = prepare(*layer, bits, mask=mask, precision=precision, block=96)  # type: ignore[arg-type]
    exact = prepare(*layer, bits, mask=mask, precision="float64", block=96)
    plain, fused = torch.zeros_like(problem.target), torch.zeros_like(problem.target)
    found = {"codes": 0, "counts": 0, "missed": 0.0, "gain": 0.0}
    for rounded in (True, False, True):
        before = fused.to(torch.float64, copy=True)
        changed, _ = sweep_(problem, plain, rounded, "torch")
        fused_changed, gain = sweep_(problem, fused, rounded, "triton")
        found["counts"] += abs(int(changed) - int(fused_changed))
        found["missed"] = max(found["missed"], missed_by(exact, before, fused.double(), rounded))
        start, end = objective(exact, before), objective(exact, fused.double())
        found["gain"] = max(found["gain"], float(((end - start - gain).abs() / torch.maximum(start, end)).max()))
    found["codes"] = int((codes_of(problem, plain) != codes_of(problem, fused)).sum())
    odd, kept = torch.arange(outputs, device=device) % 2 == 1, [empty_codes(problem), empty_codes(problem)]
    for backend, packed in zip(("torch", "triton"), kept, strict=True):
        keep_codes_(problem, fused, odd, packed, backend)  # type: ignore[arg-type]
    assert torch.equal(*kept)
    return found


class Sweep(NamedTuple):
    """Values and codes ``[o, i]`` after one sweep, and what ``sweep_`` says of it."""

    values: Tensor
    codes: Tensor
    changed: Tensor
    gain: Tensor


def sweep(
    target: Tensor, gram: Tensor, values: Tensor, scale: Tensor, zero_point: Tensor, bits: int, *,
    rounded: bool = True, **options: Any,
) -> Sweep:  # fmt: skip
    """One sweep of quantized or relaxed weights ``[o, i]``."""
    problem = prepare(target, gram, scale, zero_point, bits, **options)
    start = values.to(problem.target.dtype).t().clone(memory_format=torch.contiguous_format)
    residual = to_residual_(problem, start)
    changed, gain = sweep_(problem, residual, rounded)
    codes = codes_of(problem, residual)
    return Sweep(to_values_(problem, residual, rounded).t(), codes.t(), changed, gain)


def small_layer() -> tuple[Tensor, Tensor]:
    weight, gram = make_layer(40, 72, tokens=300)
    return weight.float(), gram.float()
