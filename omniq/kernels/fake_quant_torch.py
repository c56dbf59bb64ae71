# SPDX-License-Identifier: Apache-2.0
"""The torch implementation of ``omniq.kernels.fake_quant``: forward and analytic backward, one chunk of rows at a time.

Scratch memory is a few chunks for a weight of any size. On a CPU a chunk stays in cache, and the scaled weight exists
for one chunk only. Two choices make the passes faster:

- ``round(w / s)`` is clamped to ``[-z, L - z]``, which is exact, instead of adding and subtracting the zero point;
- the mask of unclipped weights is a tensor of ones and zeros in floating point, because boolean masks are several times
  slower.

Shapes: ``o`` output features, ``i`` input features, ``G`` groups in a row, ``g`` group size, ``r`` rows of a chunk.
"""

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

# Weights in a chunk. On a CPU, 1 MiB in float32: scratch stays in cache, and the calls (2 us each) cost little compared
# with the passes (3072 x 576, 2 cores, forward + backward: 2.1 ms at 2^16, 1.4 at 2^18, 7.2 unchunked).
_CHUNK = 2**18
_CHUNK_DEVICE = 2**24  # on a GPU launches cost more than passes: 64 MiB of float32 scratch


class Operands(NamedTuple):
    """The tensors of one call, or their gradients. An empty tensor stands for one that is absent.

    Args:
        weight: ``[o, i]``.
        rows, columns: factors of the outputs ``[o]`` and inputs ``[i]``; absent factors are ones.
        lo, hi: range of each group, ``[o, G]``; if absent, the range is that of the scaled weight.
        upper, lower: logits of the fractions of ``hi`` and ``lo`` that are kept, ``[o, G]``.
    """

    weight: Tensor
    rows: Tensor
    columns: Tensor
    lo: Tensor
    hi: Tensor
    upper: Tensor
    lower: Tensor


def fits(x: Operands, own_range: bool) -> bool:
    """True: torch runs operands of any shape."""
    return True


def forward(x: Operands, bits: int, symmetric: bool, out_dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """Fake-quantize.

    Returns:
        ``w^`` in ``out_dtype``, ``[o, i]``; and the range that was computed, two ``[o, G]``, empty if ``x`` has one.
    """
    out, (lo, hi) = empty_like(x.weight, out_dtype), empty_range(x)
    dtype, groups = compute_dtype(x.weight), (x.upper.shape[-1], -1)
    if x.lo.numel():
        s, least, most = quantization_grid(dtype, x.lo, x.hi, x.upper, x.lower, bits, symmetric)
    for rows in chunks(x.weight):
        w = _scaled_rows(x, rows).unflatten(-1, groups)  # [r, G, g]
        if x.lo.numel():
            grid = s[rows], least[rows], most[rows]
        else:
            smallest, largest = w.aminmax(dim=-1)
            lo[rows], hi[rows] = smallest.clamp(max=0), largest.clamp(min=0)
            grid = quantization_grid(dtype, lo[rows], hi[rows], x.upper[rows], x.lower[rows], bits, symmetric)
        _round_into(out[rows].unflatten(-1, groups), w, *grid)
    return out, lo, hi


def backward(grad: Tensor, x: Operands, bits: int, symmetric: bool, own_range: bool, to_weight: bool) -> Operands:
    """Gradients of the operands, each in its own dtype; empty as ``empty_gradients`` says.

    Args:
        grad: gradient of ``w^``, ``[o, i]``.
        x: as in the forward pass, with ``lo`` and ``hi`` filled in.
        bits, symmetric: as in the forward pass.
        own_range: the range was computed from the scaled weight, so its gradient flows to the extreme weights.
        to_weight: compute the gradient of the weight and of a given range.
    """
    if own_range:
        return _backward_own_range(grad, x, bits, symmetric, to_weight)
    made, dtype, groups = empty_gradients(x, own_range, to_weight), compute_dtype(x.weight), (x.upper.shape[-1], -1)
    s, least, most = quantization_grid(dtype, x.lo, x.hi, x.upper, x.lower, bits, symmetric)
    d_scale = torch.empty_like(s.squeeze(-1))
    for rows in chunks(x.weight):
        G, w = (each[rows].unflatten(-1, groups) for each in (grad, x.weight))  # [r, G, g]
        d_scale[rows], inside = _through_rounding(G, w, s[rows], least[rows], most[rows])
        if to_weight:
            made.weight[rows] = inside.mul_(G).flatten(-2)
    # Outside the loop, because thirty calls on so little data cost as much as the passes over a chunk.
    for out, value in zip(made[3:], _range_gradients(d_scale, x, slice(None), bits, symmetric), strict=True):
        if out.numel():
            out.copy_(value)
    return made


def _backward_own_range(grad: Tensor, x: Operands, bits: int, symmetric: bool, to_weight: bool) -> Operands:
    made, groups = empty_gradients(x, True, to_weight), (x.upper.shape[-1], -1)
    over_rows = torch.zeros(x.columns.shape, dtype=x.lo.dtype, device=x.lo.device)
    for rows in chunks(x.weight):
        w = _scaled_rows(x, rows).unflatten(-1, groups)  # [r, G, g]
        grid = quantization_grid(x.lo.dtype, x.lo[rows], x.hi[rows], x.upper[rows], x.lower[rows], bits, symmetric)
        G = grad[rows].unflatten(-1, groups)
        d_scale, inside = _through_rounding(G, w, *grid)
        d_w = inside.mul_(G)
        d_lo, d_hi, made.upper[rows], made.lower[rows] = _range_gradients(d_scale, x, rows, bits, symmetric)
        _add_to_extremes(d_w, w, x.lo[rows], d_lo)
        _add_to_extremes(d_w, w, x.hi[rows], d_hi)
        d_scaled = d_w.flatten(-2)  # [r, i]
        if to_weight:
            made.weight[rows] = _times_factors(d_scaled, x, rows)
        product = d_scaled.mul_(w.flatten(-2))
        if x.rows.numel():
            made.rows[rows] = product.sum(-1) / x.rows[rows]
        if x.columns.numel():
            over_rows += product.sum(0)
    made.columns.copy_(over_rows / x.columns)
    return made


def empty_like(tensor: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """A new contiguous tensor of the same shape; of the same dtype by default."""
    return torch.empty_like(tensor, dtype=dtype, memory_format=torch.contiguous_format)


def empty_range(x: Operands) -> tuple[Tensor, Tensor]:
    """New tensors for the range of each group, ``[o, G]``; empty if ``x`` has a range."""
    shape, dtype = (0,) if x.lo.numel() else x.upper.shape, compute_dtype(x.weight)
    return x.weight.new_empty(shape, dtype=dtype), x.weight.new_empty(shape, dtype=dtype)


def empty_gradients(x: Operands, own_range: bool, to_weight: bool) -> Operands:
    """New tensors for the gradients of the operands.

    The gradient of an absent factor is empty. So are those of ``weight``, ``lo`` and ``hi`` without ``to_weight``, and
    those of ``lo`` and ``hi`` with ``own_range``.
    """
    to_range = to_weight and not own_range
    wanted = (to_weight, True, True, to_range, to_range, True, True)
    return Operands(*(empty_like(each) if want else each.new_empty(0) for each, want in zip(x, wanted, strict=True)))


def compute_dtype(weight: Tensor) -> torch.dtype:
    """The dtype of the arithmetic: float32, or float64 for a weight in float64."""
    return torch.promote_types(weight.dtype, torch.float32)


def clip_range(lo: Tensor, hi: Tensor, upper: Tensor, lower: Tensor) -> tuple[Tensor, Tensor]:
    """The learned range ``(sigmoid(lower) lo, sigmoid(upper) hi)`` of each group, in the shape of its arguments."""
    return lower.sigmoid() * lo, upper.sigmoid() * hi


def quantization_grid(
    dtype: torch.dtype, lo: Tensor, hi: Tensor, upper: Tensor, lower: Tensor, bits: int, symmetric: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Scale, ``-z`` and ``L - z`` of each group, ``[o, G, 1]``."""
    max_code = 2**bits - 1
    xmin, xmax = clip_range(*(each.to(dtype).unsqueeze(-1) for each in (lo, hi, upper, lower)))
    s = 2 * torch.maximum(xmax, -xmin) / max_code if symmetric else (xmax - xmin) / max_code
    s = s.clamp(min=torch.finfo(dtype).tiny)
    z = torch.full_like(s, 2 ** (bits - 1)) if symmetric else (-xmin / s).round().clamp(0, max_code)
    return s, -z, max_code - z


def clamp(x: Tensor, least: Tensor, most: Tensor, out: Tensor) -> Tensor:
    """Clamp ``x`` ``[r, G, g]`` to bounds ``[r, G, 1]`` that broadcast, into ``out``, which may be ``x`` itself."""
    if x.device.type != "cpu":
        return torch.clamp(x, least, most, out=out)
    # 2^18 numbers in groups of 64 on one thread: 177 us by clamp_, which is not vectorized here, and 22 us by these.
    return torch.minimum(torch.maximum(x, least, out=out), most, out=out)


def chunks(weight: Tensor) -> Iterator[slice]:
    """Slices of rows whose scratch stays in cache."""
    size = _CHUNK if weight.device.type == "cpu" else _CHUNK_DEVICE
    step = max(1, size // weight.shape[-1])
    return (slice(start, start + step) for start in range(0, weight.shape[0], step))


def _scaled_rows(x: Operands, rows: slice) -> Tensor:
    """Some rows of ``diag(r) W diag(c)``, ``[r, i]``; in the weight's dtype if there are no factors."""
    return _times_factors(x.weight[rows], x, rows)


def _times_factors(w: Tensor, x: Operands, rows: slice) -> Tensor:
    """Multiply rows ``[r, i]`` by their factors: columns first, as ``ScaledWeight.tensor`` does."""
    dtype = compute_dtype(x.weight)
    w = w * x.columns.to(dtype) if x.columns.numel() else w
    return w * x.rows[rows].to(dtype).unsqueeze(-1) if x.rows.numel() else w


def _round_into(out: Tensor, w: Tensor, s: Tensor, least: Tensor, most: Tensor) -> None:
    """Fake-quantize groups ``[r, G, g]`` on their grids ``[r, G, 1]``."""
    steps = (w / s).round_()
    torch.mul(clamp(steps, least, most, out=steps), s, out=out)


def _through_rounding(G: Tensor, w: Tensor, s: Tensor, least: Tensor, most: Tensor) -> tuple[Tensor, Tensor]:
    """Gradient of the scale, ``[r, G]``, and the mask of unclipped weights as ones and zeros, ``[r, G, g]``.

    Args:
        G: gradient of the result, ``[r, G, g]``; its product with the mask is the gradient of the weights.
        w: weights, ``[r, G, g]``.
        s, least, most: from ``quantization_grid``, ``[r, G, 1]``.
    """
    steps = w / s
    inside = steps.round()
    codes = clamp(inside, least, most, out=torch.empty_like(inside))  # q - z
    inside.eq_(codes)
    residual = codes.addcmul_(steps, inside, value=-1).mul_(G)
    return residual.sum(-1), inside


def _range_gradients(
    d_scale: Tensor, x: Operands, rows: slice, bits: int, symmetric: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of lo, hi, upper and lower, ``[r, G]`` each, from that of the scale."""
    max_code, dtype = 2**bits - 1, d_scale.dtype
    lo, hi, upper, lower = (each[rows].to(dtype) for each in x[3:])
    keep_hi, keep_lo = upper.sigmoid(), lower.sigmoid()
    xmin, xmax = keep_lo * lo, keep_hi * hi
    if symmetric:
        # The side that sets the scale gets the whole gradient; in a tie each side gets half.
        tie_share = torch.heaviside(xmax + xmin, xmax.new_full((), 0.5))
        s, to_hi, to_lo = 2 * torch.maximum(xmax, -xmin) / max_code, 2 * tie_share, 2 * (1 - tie_share)
    else:
        s = (xmax - xmin) / max_code
        to_hi = to_lo = torch.ones_like(s)
    d_scale = d_scale.masked_fill(s < torch.finfo(dtype).tiny, 0) / max_code
    d_max, d_min = to_hi * d_scale, -to_lo * d_scale
    return d_min * keep_lo, d_max * keep_hi, d_max * xmax * (1 - keep_hi), d_min * xmin * (1 - keep_lo)


def _add_to_extremes(d_w: Tensor, w: Tensor, bound: Tensor, d_bound: Tensor) -> None:
    """Add the gradient of a bound ``[r, G]`` to that of the weights ``[r, G, g]`` equal to it, in equal shares."""
    extreme = (w == bound.unsqueeze(-1)).to(d_w.dtype)
    tie_share = d_bound / extreme.sum(-1).clamp(min=1)  # no weight may equal the bound if it is the included zero
    d_w.addcmul_(extreme, tie_share.unsqueeze(-1))
