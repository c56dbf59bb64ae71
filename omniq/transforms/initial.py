# SPDX-License-Identifier: Apache-2.0
"""Where a transform starts: SmoothQuant's scales and Outlier Suppression+'s shifts, from one pass over the inputs.

For input channel ``j`` with observed range ``[lo_j, hi_j]``:

    d_j = (hi_j + lo_j) / 2                                 shift (Outlier Suppression+, arXiv 2304.09145)
    a_j = max(hi_j - d_j, d_j - lo_j)                       size of what remains after the shift; d = 0 without one
    w_j = max over every consumer and output row |W_oj|     size of the weights
    s_j = a_j^alpha / w_j^(1 - alpha)                       scale (SmoothQuant, arXiv 2211.10438, equation 4)

Scales of query . key start at one. With grouped-query attention the channels of a KV head's readers are taken together:
the widest range, the largest weight.

Deviations from OmniQuant's code: all consumers of an input count, not only q_proj or up_proj; ``a`` is measured after
the shift; the range is exact over the samples, where the published code takes the maximum for scales but an exponential
average for shifts.

Shapes: ``o`` output features, ``i`` input features, ``c`` parameters of an equivalence.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from omniq.errors import UserError
from omniq.transforms.equivalence import LIMIT, QueryKey, Transform, ValueToOutput, modules_of

FLOOR = 1e-5  # of activation and weight sizes, so that a dead channel gets a finite scale (OmniQuant's code)


@dataclass
class ChannelRanges:
    """Smallest and largest value of every channel of some inputs.

    Args:
        lo, hi: float32 ``[i]`` by the name of the linear that reads the input.
    """

    lo: dict[str, Tensor] = field(default_factory=dict)
    hi: dict[str, Tensor] = field(default_factory=dict)


def initial_values(
    transform: Transform,
    tensors: Mapping[str, Tensor],
    ranges: ChannelRanges,
    alpha: float | None = 0.5,
    shift: bool = True,
) -> dict[str, Tensor]:
    """Where the parameters of a transform start; pass them to ``Transform.parameters``.

    Args:
        transform: of the block.
        tensors: the block's parameters by name.
        ranges: of the inputs of the block's linears: for each equivalence, of one linear that reads there, if any
            token does.
        alpha: how much of the size of activations moves into the weights: 0 none, 1 all. None: scales start at one.
        shift: start shifts at the middle of the range, where the transform has them; else at zero.

    Raises:
        UserError: alpha outside 0..1.
    """
    check_alpha(alpha)
    values = {}
    for key, move in transform.moves.items():
        if isinstance(move, QueryKey):
            continue
        readers = modules_of(move)[1:]
        seen = next((name for name in readers if name in ranges.lo), None)
        if seen is None:  # no token reaches its readers: it starts at the identity
            continue
        lo, hi = ranges.lo[seen], ranges.hi[seen]
        weight = torch.stack([tensors[f"{name}.weight"].abs().amax(0) for name in readers]).amax(0).float()  # [i]
        if isinstance(move, ValueToOutput):
            by_key = transform.heads.by_key  # [i] -> [c, readers of a KV channel]
            lo, hi, weight = by_key(lo).amin(1), by_key(hi).amax(1), by_key(weight).amax(1)
        middle = torch.zeros_like(lo)
        if shift and f"{key}/shift" in transform.shapes:
            middle = values[f"{key}/shift"] = (lo + hi) / 2
        if alpha is not None:
            values[f"{key}/log_scale"] = smooth_scale(torch.maximum(hi - middle, middle - lo), weight, alpha).log()
    return values


def smooth_scale(activation: Tensor, weight: Tensor, alpha: float) -> Tensor:
    """SmoothQuant's scale ``activation^alpha / weight^(1 - alpha)`` from sizes ``[c]``, within a transform's limits."""
    scale = activation.clamp(min=FLOOR) ** alpha / weight.clamp(min=FLOOR) ** (1 - alpha)
    return scale.clamp(math.exp(-LIMIT), math.exp(LIMIT))


def check_alpha(alpha: float | None) -> None:
    """Refuse a migration strength outside 0..1.

    Raises:
        UserError: names it.
    """
    if alpha is not None and not 0 <= alpha <= 1:
        raise UserError(
            f"alpha {alpha} is outside 0..1: 0 leaves activations alone, 1 moves all of their range to weights"
        )
