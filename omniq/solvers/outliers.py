# SPDX-License-Identifier: Apache-2.0
"""A few weights in full precision beside the codes: their choice and their updates (QuantEase).

    minimise  ||(W - B - H) X||^2,   B on the grid,   H non-zero in at most k entries, or in at most k whole columns

The paper is arXiv 2309.01885. There are two ways to solve this problem:

- The **masked sweep** chooses the support of H once and excludes it from the grid's range. Descent then leaves the
  coordinates of the support unrounded: it is the usual sweep with a mask.
- **Algorithm 3** alternates a sweep over B, whose target is W - H, with a step of iterative hard thresholding on H:

    H <- TopK(H - grad / L),   grad = 2 (B + H - W) S,   L = 2 lambda_max(S)

**Deviations.** The published code takes half of that step, estimates the eigenvalue from an unseeded random
start, chooses the support without looking at the activations, and never writes the rounded weights. Its ranges trim a
fixed count from either side, wherever H lies. Here the range of the grid ignores the support by taking those weights as
0, which every grid represents exactly: pass ``weight.masked_fill(mask, 0)`` to ``Grid.range`` or ``search_range``.

On real layers lambda_max is hundreds of times the mean diagonal, so the step of Algorithm 3 hardly changes H. The
masked sweep is better or equal and costs no extra time.

Shapes: ``o`` output features, ``i`` input features, ``G`` groups.
"""

from typing import Literal

import torch
from torch import Tensor

from omniq.errors import UserError
from omniq.grid.affine import Grid
from omniq.kernels.layer_problem import DEAD
from omniq.kernels.products import next_power_of_two
from omniq.quantizers.search import search_range

Criterion = Literal["magnitude", "loss"]

_SEARCHES = 3  # of range and support in turn: 3 to 9 % less error than one; a fourth changes it by 0.6 % at most
_SAFETY = 1.001  # factor on lambda_max: power iteration approaches it from below, and a step over 1 / L may raise f


def count_of(shape: tuple[int, int], fraction: float, structured: bool) -> int:
    """Number of entries, or of whole columns, in a fraction of a layer ``(o, i)``: at least one, unless it is 0.

    Raises:
        UserError: the fraction is outside 0 to 0.5.
    """
    if not 0 <= fraction <= 0.5:
        raise UserError(f"outlier fraction {100 * fraction:g} % is outside 0..50 %: one per cent is a good start")
    outputs, inputs = shape
    count = round(inputs * fraction) if structured else round(outputs * inputs * fraction)
    return max(1, count) if fraction else 0


def choose_support(
    weight: Tensor,
    fraction: float,
    *,
    by: Criterion = "magnitude",
    structured: bool = False,
    second_moment: Tensor | None = None,
    grid: Grid | None = None,
) -> Tensor:
    """The coordinates that a sparse part stores.

    Args:
        weight: ``[o, i]``.
        fraction: fraction of the entries, or of the columns if structured, 0 to 0.5.
        by: "magnitude": the largest ``|w|`` (columns: norms); "loss": the largest ``S_jj (w - Q(w))^2`` (columns:
            sums), the diagonal of the layer's error, where Q has the searched range. Range and support are searched in
            turn, three times, the range without the support: a good range clips the weights that cost most on any grid.
            (Min-max does not clip, so its losses are rounding noise and give a useless support.)
        structured: choose whole columns.
        second_moment: S_jj, ``[i]``, for "loss".
        grid: bits and groups, for "loss".

    Returns:
        bool ``[o, i]``, True in exactly ``count_of`` entries or columns; ties go to the first.

    Raises:
        UserError: see ``count_of``.
        ValueError: "loss" without second moments or grid.
    """
    count = count_of((weight.shape[0], weight.shape[1]), fraction, structured)
    if by == "magnitude":
        return _largest(weight.abs(), count, structured)
    if second_moment is None or grid is None:
        raise ValueError("a support by 'loss' needs second_moment and grid: give both, or choose by 'magnitude'")
    mask = torch.zeros_like(weight, dtype=torch.bool)
    for _ in range(_SEARCHES):
        scale, zero_point = grid.fit(*search_range(weight.masked_fill(mask, 0), grid, second_moment))
        rounded = grid.dequantize(grid.quantize(weight, scale, zero_point), scale, zero_point)
        mask = _largest((weight - rounded).abs() * second_moment.sqrt(), count, structured)
    return mask


def hard_threshold(values: Tensor, count: int, structured: bool = False) -> Tensor:
    """TopK: keep the ``count`` largest entries of ``[o, i]`` (or columns, by norm), set the others to 0."""
    return torch.where(_largest(values.abs(), count, structured), values, 0)


def _largest(score: Tensor, count: int, structured: bool) -> Tensor:
    """Mask of the ``count`` largest scores (columns: sums of their squares), bool ``[o, i]``; ties go to the first."""
    flat = score.square().sum(0) if structured else score.flatten()
    chosen = torch.zeros_like(flat, dtype=torch.bool)
    if count:
        least = flat.topk(count).values[-1]
        chosen = flat > least
        ties = (flat == least).nonzero().flatten()
        chosen[ties[: count - int(chosen.sum())]] = True
    return chosen.expand(score.shape) if structured else chosen.view(score.shape)


def largest_eigenvalue(gram: Tensor, tolerance: float = 1e-7, steps: int = 1000) -> Tensor:
    """``lambda_max`` by power iteration from a fixed vector, a scalar; 0 if all inputs are zero.

    The start is the square root of the diagonal: large where the inputs are large, and never orthogonal to a dominant
    direction with entries of one sign.

    Args:
        gram: ``[i, i]``, symmetric, positive semidefinite.
        tolerance: relative change of the estimate at which to stop.
        steps: at most this many products.
    """
    diagonal, tiny = gram.diagonal(), torch.finfo(gram.dtype).tiny
    vector = diagonal.clamp_min(DEAD * diagonal.mean()).sqrt()
    unit = next_power_of_two(diagonal.amax())  # exact, and no square over- or underflows
    estimate = torch.zeros((), dtype=gram.dtype, device=gram.device)
    for _ in range(steps):
        vector = gram @ (vector / vector.norm().clamp_min(tiny)) / unit
        before, estimate = estimate, vector.norm()
        if estimate - before <= tolerance * estimate:
            break
    return estimate * unit


def threshold_step(
    residual: Tensor, sparse: Tensor, gram: Tensor, count: int, lambda_max: Tensor, structured: bool = False
) -> Tensor:
    """One step of iterative hard thresholding on the sparse part (Algorithm 3), which never raises the error.

    Args:
        residual: ``W - B - H``, ``[o, i]``; sparse: H, ``[o, i]``.
        gram: S, ``[i, i]``.
        count: entries (or columns) that H may have.
        lambda_max: of ``gram``, from ``largest_eigenvalue``.
        structured: keep whole columns.

    Returns:
        the new H.
    """
    bound = (_SAFETY * lambda_max).clamp_min(torch.finfo(lambda_max.dtype).tiny)
    step = residual @ gram / bound  # -grad / L = 2 (W - B - H) S / (2 lambda_max)
    return hard_threshold(sparse + step, count, structured)
