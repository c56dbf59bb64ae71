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
# passes (3072 x 576, 2 cores, forward + backward: 2.1 ms at 2^16, 1.4 at 2^18, 7.2 unchunked).
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
) -> Tensor:
    """``w^`` in ``out_dtype``, ``[o, i]``."""
    out = torch.empty_like(weight, dtype=out_dtype, memory_format=torch.contiguous_format)
    groups = (lo.shape[-1], -1)
    s, least, most = bounds(computed(weight), lo, hi, upper, lower, bits, symmetric)
    for part in chunks(weight):
        w = weight[part].unflatten(-1, groups)
        round_into(out[part].unflatten(-1, groups), w, s[part], least[part], most[part])
    return out


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
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of weight, lo, hi, upper, lower, each in its own dtype, or empty (see ``room_for_gradients``)."""
    made = room_for_gradients(weight, lo, hi, upper, lower, moving)
    s, least, most = bounds(computed(weight), lo, hi, upper, lower, bits, symmetric)
    groups, d_scale = (lo.shape[-1], -1), torch.empty_like(s.squeeze(-1))
    for part in chunks(weight):
        G, w = (each[part].unflatten(-1, groups) for each in (grad, weight))  # [r, G, g]
        d_scale[part], inside = through_rounding(G, w, s[part], least[part], most[part])
        if moving:
            made[0][part] = inside.mul_(G).flatten(-2)
    # Outside the loop: thirty calls on so little cost as much as the passes over a chunk.
    for out, value in zip(made[1:], range_gradients(d_scale, lo, hi, upper, lower, bits, symmetric), strict=True):
        if out.numel():
            out.copy_(value)
    return made


def room_for_gradients(
    weight: Tensor, lo: Tensor, hi: Tensor, upper: Tensor, lower: Tensor, moving: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """New tensors for the gradients of weight, lo, hi, upper, lower; the first three empty if nobody asks."""
    d_weight, d_lo, d_hi = (room(each) if moving else each.new_empty(0) for each in (weight, lo, hi))
    return d_weight, d_lo, d_hi, room(upper), room(lower)


def room(like: Tensor) -> Tensor:
    """A new contiguous tensor of that shape and dtype."""
    return torch.empty_like(like, memory_format=torch.contiguous_format)


def computed(weight: Tensor) -> torch.dtype:
    """The dtype of the arithmetic: float32, or float64 for a weight in float64."""
    return torch.promote_types(weight.dtype, torch.float32)


def bounds(
    dtype: torch.dtype, lo: Tensor, hi: Tensor, upper: Tensor, lower: Tensor, bits: int, symmetric: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Scale, ``-z`` and ``L - z`` of each group, ``[o, G, 1]``."""
    max_code = 2**bits - 1
    xmin, xmax = clip_range(*(each.to(dtype).unsqueeze(-1) for each in (lo, hi, upper, lower)))
    s = 2 * torch.maximum(xmax, -xmin) / max_code if symmetric else (xmax - xmin) / max_code
    s = s.clamp(min=torch.finfo(dtype).tiny)
    z = torch.full_like(s, 2 ** (bits - 1)) if symmetric else (-xmin / s).round().clamp(0, max_code)
    return s, -z, max_code - z


def round_into(out: Tensor, w: Tensor, s: Tensor, least: Tensor, most: Tensor) -> None:
    """Fake-quantize groups ``[r, G, g]`` on their grids ``[r, G, 1]``."""
    steps = (w / s).round_()
    torch.mul(clamp(steps, least, most, out=steps), s, out=out)


def through_rounding(G: Tensor, w: Tensor, s: Tensor, least: Tensor, most: Tensor) -> tuple[Tensor, Tensor]:
    """The gradient of the scale, ``[r, G]``, and ones and zeros for what is inside, ``[r, G, g]``.

    Args:
        G: gradient of the result, ``[r, G, g]``; times the ones and zeros it is that of the weights.
    """
    steps = w / s
    inside = steps.round()
    codes = clamp(inside, least, most, out=torch.empty_like(inside))  # q - z
    inside.eq_(codes)
    residual = codes.addcmul_(steps, inside, value=-1).mul_(G)
    return residual.sum(-1), inside


def clamp(x: Tensor, least: Tensor, most: Tensor, out: Tensor) -> Tensor:
    """``x`` between bounds that broadcast, ``[r, G, g]`` and ``[r, G, 1]``, into ``out``, which may be ``x`` itself."""
    if x.device.type != "cpu":
        return torch.clamp(x, least, most, out=out)
    # 2^18 numbers in groups of 64, one thread: 177 us by clamp_, which takes no vector instructions here, 22 by these.
    return torch.minimum(torch.maximum(x, least, out=out), most, out=out)


def range_gradients(
    d_scale: Tensor, lo: Tensor, hi: Tensor, upper: Tensor, lower: Tensor, bits: int, symmetric: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """From the gradient of the scale to those of lo, hi, upper, lower, ``[r, G]`` each."""
    max_code, dtype = 2**bits - 1, d_scale.dtype
    keep_hi, keep_lo = upper.to(dtype).sigmoid(), lower.to(dtype).sigmoid()
    xmin, xmax = keep_lo * lo.to(dtype), keep_hi * hi.to(dtype)
    if symmetric:
        # The side that sets the scale gets everything; 0.5 is its share in a tie.
        share = torch.heaviside(xmax + xmin, xmax.new_full((), 0.5))
        s, to_hi, to_lo = 2 * torch.maximum(xmax, -xmin) / max_code, 2 * share, 2 * (1 - share)
    else:
        s = (xmax - xmin) / max_code
        to_hi = to_lo = torch.ones_like(s)
    d_scale = d_scale.masked_fill(s < torch.finfo(dtype).tiny, 0) / max_code
    d_max, d_min = to_hi * d_scale, -to_lo * d_scale
    return d_min * keep_lo, d_max * keep_hi, d_max * xmax * (1 - keep_hi), d_min * xmin * (1 - keep_lo)


def chunks(weight: Tensor) -> Iterator[slice]:
    """Slices of rows whose scratch stays in cache."""
    size = _CHUNK if weight.device.type == "cpu" else _CHUNK_DEVICE
    step = max(1, size // weight.shape[-1])
    return (slice(start, start + step) for start in range(0, weight.shape[0], step))
