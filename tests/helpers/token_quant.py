# SPDX-License-Identifier: Apache-2.0
"""Independent reference of fake quantization of tokens, and random tokens."""

import torch
from torch import Tensor

from tests.helpers.fake_quant import straight_through


def paper(x: Tensor, bits: int, symmetric: bool) -> Tensor:
    """Fake quantization of the last dimension in differentiable torch, unsigned codes."""
    lo, hi = x.amin(-1, keepdim=True), x.amax(-1, keepdim=True)
    lo, hi = torch.where(lo < 0, lo, 0), torch.where(hi > 0, hi, 0)
    step = (2 * torch.maximum(-lo, hi) if symmetric else hi - lo) / (2**bits - 1)
    step = torch.where(step == 0, 1.0, step)
    zero = torch.full_like(step, 2 ** (bits - 1)) if symmetric else torch.round(-lo / step).detach()
    n = x / step
    return (torch.clip(straight_through(n, torch.round(n)) + zero, 0, 2**bits - 1) - zero) * step


def tokens(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    draw = torch.Generator().manual_seed(seed)
    channel = torch.randn(shape[-1], generator=draw).exp()  # channels of different size, as activations have
    return (torch.randn(*shape, generator=draw) * channel + 0.3).to(dtype)
