# SPDX-License-Identifier: Apache-2.0
"""The chunked torch version of ``omniq.kernels.fake_quant_moving``: the moved matrix exists a chunk of rows at a time.

Shapes: ``o`` output features, ``i`` input features, ``G`` groups in a row, ``g`` group size, ``r`` rows of a chunk.
"""

import torch
from torch import Tensor

from omniq.kernels.fake_quant_torch import bounds, chunks, computed, range_gradients, room, round_into, through_rounding


def forward(
    weight: Tensor,
    rows: Tensor,
    columns: Tensor,
    upper: Tensor,
    lower: Tensor,
    bits: int,
    symmetric: bool,
    out_dtype: torch.dtype,
) -> tuple[Tensor, Tensor, Tensor]:
    """``w^`` in ``out_dtype``, ``[o, i]``, and the range of the moved weight, two ``[o, G]``; empty factors are one."""
    out = torch.empty_like(weight, dtype=out_dtype, memory_format=torch.contiguous_format)
    lo, hi = room_for_range(weight, upper)
    groups = (upper.shape[-1], -1)
    for part in chunks(weight):
        w = _moved(weight, rows, columns, part).unflatten(-1, groups)
        smallest, largest = w.aminmax(dim=-1)
        lo[part], hi[part] = smallest.clamp(max=0), largest.clamp(min=0)
        grid = bounds(lo.dtype, lo[part], hi[part], upper[part], lower[part], bits, symmetric)
        round_into(out[part].unflatten(-1, groups), w, *grid)
    return out, lo, hi


def backward(
    grad: Tensor,
    weight: Tensor,
    rows: Tensor,
    columns: Tensor,
    lo: Tensor,
    hi: Tensor,
    upper: Tensor,
    lower: Tensor,
    bits: int,
    symmetric: bool,
    to_weight: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of weight, rows, columns, upper, lower, each in its own dtype, or empty (``room_for_gradients``)."""
    d_weight, d_rows, d_columns, d_upper, d_lower = room_for_gradients(weight, rows, columns, upper, lower, to_weight)
    groups = (upper.shape[-1], -1)
    over_rows = torch.zeros(columns.shape, dtype=lo.dtype, device=lo.device)
    for part in chunks(weight):
        w = _moved(weight, rows, columns, part).unflatten(-1, groups)  # [r, G, g]
        grid = bounds(lo.dtype, lo[part], hi[part], upper[part], lower[part], bits, symmetric)
        G = grad[part].unflatten(-1, groups)
        d_scale, inside = through_rounding(G, w, *grid)
        d_w = inside.mul_(G)
        to_lo, to_hi, d_upper[part], d_lower[part] = range_gradients(
            d_scale, lo[part], hi[part], upper[part], lower[part], bits, symmetric
        )
        _add_at(d_w, w, lo[part], to_lo)
        _add_at(d_w, w, hi[part], to_hi)
        d_moved = d_w.flatten(-2)  # [r, i]
        if to_weight:
            d_weight[part] = _by_rows(_by_columns(d_moved, columns), rows[part])
        carried = d_moved.mul_(w.flatten(-2))
        if rows.numel():
            d_rows[part] = carried.sum(-1) / rows[part]
        if columns.numel():
            over_rows += carried.sum(0)
    return d_weight, d_rows, d_columns.copy_(over_rows / columns), d_upper, d_lower


def room_for_range(weight: Tensor, upper: Tensor) -> tuple[Tensor, Tensor]:
    """New tensors for the range of every group, ``[o, G]``."""
    dtype = computed(weight)
    return weight.new_empty(upper.shape, dtype=dtype), weight.new_empty(upper.shape, dtype=dtype)


def room_for_gradients(
    weight: Tensor, rows: Tensor, columns: Tensor, upper: Tensor, lower: Tensor, to_weight: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """New tensors for the gradients of weight, rows, columns, upper, lower; the first empty if nobody asks."""
    d_weight = room(weight) if to_weight else weight.new_empty(0)
    return d_weight, room(rows), room(columns), room(upper), room(lower)


def _moved(weight: Tensor, rows: Tensor, columns: Tensor, part: slice) -> Tensor:
    """These rows of the moved weight, ``[r, i]``: columns first, as ``Scaled.tensor`` has it."""
    return _by_rows(_by_columns(weight[part].to(computed(weight)), columns), rows[part])


def _by_columns(w: Tensor, columns: Tensor) -> Tensor:
    return w * columns.to(w.dtype) if columns.numel() else w


def _by_rows(w: Tensor, rows: Tensor) -> Tensor:
    return w * rows.to(w.dtype).unsqueeze(-1) if rows.numel() else w


def _add_at(d_w: Tensor, w: Tensor, bound: Tensor, d_bound: Tensor) -> None:
    """Add the gradient of a bound ``[r, G]`` to that of the weights ``[r, G, g]`` equal to it, shared evenly."""
    extreme = (w == bound.unsqueeze(-1)).to(d_w.dtype)
    share = d_bound / extreme.sum(-1).clamp(min=1)  # none where the bound is the included zero
    d_w.addcmul_(extreme, share.unsqueeze(-1))
