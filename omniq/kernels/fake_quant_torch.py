# SPDX-License-Identifier: Apache-2.0
"""The chunked torch version of ``omniq.kernels.fake_quant``: forward and analytic backward, without float32 copies.

Rows are taken in chunks, so that scratch is a few chunks whatever the size of the weight and stays in cache on the CPU.
Clamping ``round(w / s)`` between ``-z`` and ``L - z`` is exact and saves adding and subtracting the zero point; what is
inside the range is kept as ones and zeros in floating point, because masks are several times slower.

Shapes: ``o`` output features, ``i`` input features, ``G`` groups in a row, ``g`` group size, ``r`` rows of a chunk.
"""

from collections.abc import Iterator

import torch
from torch import Tensor

# Weights a chunk holds. On the CPU 1 MiB in float32: scratch stays in cache, and calls (2 us) cost little beside
# passes (3072 x 576, 2 cores, forward + backward: 4.5 ms at 2^16, 2.3 at 2^18, 2.0 unchunked).
_CHUNK = 2**18
_CHUNK_DEVICE = 2**24  # elsewhere launches cost more than passes: 64 MiB of float32 scratch


def clip_range(lo: Tensor, hi: Tensor, upper: Tensor, lower: Tensor) -> tuple[Tensor, Tensor]:
    """The learned range ``(sigmoid(lower) lo, sigmoid(upper) hi)`` of each group, in the shape of its arguments."""
    return lower.sigmoid() * lo, upper.sigmoid() * hi


def forward(
    weight: Tensor,
    lo: Tensor,
    hi: Tensor,
    upper: Tensor,
    lower: Tensor,
    bits: int,
    symmetric: bool,
    out_dtype: torch.dtype,
) -> tuple[Tensor, Tensor, Tensor]:
    """``w^`` in ``out_dtype``, ``[o, i]``, and the range ``[o, G]`` if it was to be found (``lo`` and ``hi`` empty)."""
    out = torch.empty_like(weight, dtype=out_dtype, memory_format=torch.contiguous_format)
    found = room_for_range(weight, lo, upper)
    groups = (upper.shape[-1], -1)
    if lo.numel() == 0:
        lo, hi = found
        for rows in _chunks(weight):
            smallest, largest = weight[rows].unflatten(-1, groups).aminmax(dim=-1)
            lo[rows], hi[rows] = smallest.clamp_(max=0), largest.clamp_(min=0)
    s, least, most = _bounds(weight, lo, hi, upper, lower, bits, symmetric)
    for rows in _chunks(weight):
        steps = weight[rows].unflatten(-1, groups) / s[rows]  # [r, G, g]
        steps.round_().clamp_(least[rows], most[rows])
        torch.mul(steps, s[rows], out=out[rows].unflatten(-1, groups))
    return out, *found


def backward(
    grad: Tensor,
    weight: Tensor,
    lo: Tensor,
    hi: Tensor,
    upper: Tensor,
    lower: Tensor,
    bits: int,
    symmetric: bool,
    moving: bool,
    own_range: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of weight, lo, hi, upper, lower, each in its own dtype, or empty (see ``room_for_gradients``)."""
    made = room_for_gradients(weight, lo, hi, upper, lower, moving, own_range)
    s, least, most = _bounds(weight, lo, hi, upper, lower, bits, symmetric)
    groups = (lo.shape[-1], -1)
    for rows in _chunks(weight):
        G = grad[rows].unflatten(-1, groups)  # [r, G, g]
        w = weight[rows].unflatten(-1, groups)
        steps = w / s[rows]
        inside = steps.round()
        codes = inside.clamp(least[rows], most[rows])  # q - z
        inside.eq_(codes)
        residual = codes.addcmul_(steps, inside, value=-1).mul_(G)
        d_lo, d_hi, made[3][rows], made[4][rows] = _range_gradients(
            residual.sum(-1), lo[rows], hi[rows], upper[rows], lower[rows], bits, symmetric
        )
        if moving:
            d_w = inside.mul_(G)
            if own_range:
                _add_at(d_w, w, lo[rows], d_lo)
                _add_at(d_w, w, hi[rows], d_hi)
            else:
                made[1][rows], made[2][rows] = d_lo, d_hi
            made[0][rows] = d_w.flatten(-2)
    return made


def room_for_range(weight: Tensor, lo: Tensor, upper: Tensor) -> tuple[Tensor, Tensor]:
    """New tensors for the range of every group, ``[o, G]``; empty where the range is given."""
    shape = upper.shape if lo.numel() == 0 else (0,)
    dtype = torch.promote_types(weight.dtype, torch.float32)
    return weight.new_empty(shape, dtype=dtype), weight.new_empty(shape, dtype=dtype)


def room_for_gradients(
    weight: Tensor, lo: Tensor, hi: Tensor, upper: Tensor, lower: Tensor, moving: bool, own_range: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """New tensors for the gradients of weight, lo, hi, upper, lower; empty where nobody asks."""
    asked = (moving, moving and not own_range, moving and not own_range, True, True)
    d_weight, d_lo, d_hi, d_upper, d_lower = (
        torch.empty_like(each, memory_format=torch.contiguous_format) if ask else each.new_empty(0)
        for each, ask in zip((weight, lo, hi, upper, lower), asked, strict=True)
    )
    return d_weight, d_lo, d_hi, d_upper, d_lower


def _bounds(
    weight: Tensor, lo: Tensor, hi: Tensor, upper: Tensor, lower: Tensor, bits: int, symmetric: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Scale, ``-z`` and ``L - z``, each ``[o, G, 1]``."""
    levels = 2**bits - 1
    dtype = torch.promote_types(weight.dtype, torch.float32)
    xmin, xmax = clip_range(*(each.to(dtype).unsqueeze(-1) for each in (lo, hi, upper, lower)))
    s = 2 * torch.maximum(xmax, -xmin) / levels if symmetric else (xmax - xmin) / levels
    s = s.clamp(min=torch.finfo(dtype).tiny)
    z = torch.full_like(s, 2 ** (bits - 1)) if symmetric else (-xmin / s).round().clamp(0, levels)
    return s, -z, levels - z


def _range_gradients(
    d_scale: Tensor, lo: Tensor, hi: Tensor, upper: Tensor, lower: Tensor, bits: int, symmetric: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """From the gradient of the scale to those of lo, hi, upper, lower, ``[r, G]`` each."""
    levels, dtype = 2**bits - 1, d_scale.dtype
    keep_hi, keep_lo = upper.to(dtype).sigmoid(), lower.to(dtype).sigmoid()
    xmin, xmax = keep_lo * lo.to(dtype), keep_hi * hi.to(dtype)
    if symmetric:
        # The side that sets the scale gets everything; 0.5 is its share in a tie.
        share = torch.heaviside(xmax + xmin, xmax.new_full((), 0.5))
        s, to_hi, to_lo = 2 * torch.maximum(xmax, -xmin) / levels, 2 * share, 2 * (1 - share)
    else:
        s = (xmax - xmin) / levels
        to_hi = to_lo = torch.ones_like(s)
    d_scale = torch.where(s < torch.finfo(dtype).tiny, 0, d_scale) / levels
    d_max, d_min = to_hi * d_scale, -to_lo * d_scale
    return d_min * keep_lo, d_max * keep_hi, d_max * xmax * (1 - keep_hi), d_min * xmin * (1 - keep_lo)


def _add_at(d_w: Tensor, w: Tensor, bound: Tensor, d_bound: Tensor) -> None:
    """Add the gradient of a bound ``[r, G]`` to that of the weights ``[r, G, g]`` equal to it, shared evenly."""
    extreme = (w == bound.unsqueeze(-1)).to(d_w.dtype)
    share = d_bound / extreme.sum(-1).clamp(min=1)  # none where the bound is the included zero
    d_w.addcmul_(extreme, share.unsqueeze(-1))


def _chunks(weight: Tensor) -> Iterator[slice]:
    """Slices of rows whose scratch stays in cache."""
    size = _CHUNK if weight.device.type == "cpu" else _CHUNK_DEVICE
    step = max(1, size // weight.shape[-1])
    return (slice(start, start + step) for start in range(0, weight.shape[0], step))
