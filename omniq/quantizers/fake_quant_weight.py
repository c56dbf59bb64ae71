# SPDX-License-Identifier: Apache-2.0
"""The clipping of one linear while a stage learns: fake-quantizes the weight and computes its final grid.

``omniq.quantizers.clipping`` and ``omniq.quantizers.absolute`` hold the equations.

Shapes: ``o`` output features, ``i`` input features, ``G`` groups, ``g`` group size.
"""

from abc import ABC, abstractmethod

import torch
from torch import Tensor, nn

from omniq.grid.affine import Grid
from omniq.kernels.fake_quant import fake_quantize
from omniq.kernels.scaled_weight import ScaledWeight, materialize

INITIAL_LOGIT = 4.0  # sigmoid(4) = 0.982: OmniQuant's start, a 1.8 % shrink (its code; the paper does not say)
OPEN_LOGIT = 40.0  # sigmoid(40) is 1 in float32
SMALLEST_FACTOR = 1e-2  # on a learned step or threshold: an optimizer step must not change its sign


class FakeQuantWeight(nn.Module, ABC):
    """The clipping of one linear during a stage: fake-quantizes its weight and computes its final grid."""

    @abstractmethod
    def forward(self, weight: Tensor | ScaledWeight, dtype: torch.dtype) -> Tensor:
        """The fake-quantized weight, differentiable in the clipping.

        Args:
            weight: ``[o, i]``; with factors if a transform scales it, which are then differentiable too.
            dtype: dtype of the result.
        """

    @abstractmethod
    def grid_of(self, weight: Tensor) -> tuple[Tensor, Tensor]:
        """Final scale and zero point, each ``[o, G]``: float32, on storage-rounded scales."""

    @abstractmethod
    def reset(self) -> None:
        """Reset the learned parameters to their start."""


class LWCWeight(FakeQuantWeight):
    """Learnable weight clipping of one linear.

    Args:
        weight: ``[o, i]``; gives the extremes of the groups.
        grid: bits, group size and symmetry.
        start: range to start from, ``(lo, hi)`` of shape ``[o, G]``.
        limit: largest logit of the start.
    """

    lo: Tensor
    hi: Tensor
    start: Tensor

    def __init__(self, weight: Tensor, grid: Grid, start: tuple[Tensor, Tensor], limit: float = INITIAL_LOGIT) -> None:
        super().__init__()
        lo, hi = grid.range(weight.float())
        for name, value in (("lo", lo), ("hi", hi)):
            self.register_buffer(name, value, persistent=False)
        initial = torch.stack([_logit(start[0], lo, limit), _logit(start[1], hi, limit)])  # [2, o, G]
        self.register_buffer("start", initial, persistent=False)
        self.grid = grid
        self.lower = nn.Parameter(initial[0].clone())
        self.upper = nn.Parameter(initial[1].clone())

    def forward(self, weight: Tensor | ScaledWeight, dtype: torch.dtype) -> Tensor:
        bounds = None if isinstance(weight, ScaledWeight) else (self.lo, self.hi)
        return fake_quantize(weight, self.upper, self.lower, self.grid, bounds, dtype)

    @torch.no_grad()
    def grid_of(self, weight: Tensor) -> tuple[Tensor, Tensor]:
        lo, hi = self.grid.range(weight.float())
        return self.grid.fit(self.lower.sigmoid() * lo, self.upper.sigmoid() * hi)

    @torch.no_grad()
    def reset(self) -> None:
        self.lower.copy_(self.start[0])
        self.upper.copy_(self.start[1])


class PACTWeight(FakeQuantWeight):
    """PACT of one linear.

    Args:
        grid: bits, group size and symmetry.
        lo, hi: range to start from, each float32 ``[o, G]``.
    """

    start: Tensor

    def __init__(self, grid: Grid, lo: Tensor, hi: Tensor) -> None:
        super().__init__()
        self.grid = grid
        self.register_buffer("start", torch.stack([lo, hi]), persistent=False)  # [2, o, G]
        self.factors = nn.Parameter(torch.ones_like(self.start))

    def forward(self, weight: Tensor | ScaledWeight, dtype: torch.dtype) -> Tensor:
        weight = materialize(weight)
        lo, hi = self._thresholds()
        if self.grid.symmetric:
            hi = torch.maximum(-lo, hi)
            lo = -hi
        groups = self.grid.split(weight.float())  # [o, G, g]
        clipped = torch.minimum(torch.maximum(groups, lo.unsqueeze(-1)), hi.unsqueeze(-1)).flatten(-2)
        with torch.no_grad():
            scale, zero_point = self.grid_of(weight)
            rounded = self.grid.dequantize(self.grid.quantize(weight, scale, zero_point), scale, zero_point)
        return (clipped + (rounded - clipped).detach()).to(dtype)

    @torch.no_grad()
    def grid_of(self, weight: Tensor) -> tuple[Tensor, Tensor]:
        return self.grid.fit(*self._thresholds())

    @torch.no_grad()
    def reset(self) -> None:
        self.factors.fill_(1.0)

    def _thresholds(self) -> tuple[Tensor, Tensor]:
        lo, hi = self.factors.clamp(min=SMALLEST_FACTOR) * self.start
        return lo, hi


class LSQWeight(FakeQuantWeight):
    """LSQ of one linear.

    Args:
        grid: bits, group size and symmetry.
        step: the scale to start from, float32 ``[o, G]``.
        zero_point: constant, ``[o, G]``.
    """

    start: Tensor
    zero_point: Tensor

    def __init__(self, grid: Grid, step: Tensor, zero_point: Tensor) -> None:
        super().__init__()
        self.grid = grid
        self.register_buffer("start", step, persistent=False)
        self.register_buffer("zero_point", zero_point, persistent=False)
        self.factors = nn.Parameter(torch.ones_like(step))

    def forward(self, weight: Tensor | ScaledWeight, dtype: torch.dtype) -> Tensor:
        step, zero = self._step().unsqueeze(-1), self.zero_point.unsqueeze(-1)  # [o, G, 1]
        steps = self.grid.split(materialize(weight).float()) / step
        rounded = steps + (steps.round() - steps).detach()
        return (((rounded + zero).clamp(0, self.grid.max_code) - zero) * step).flatten(-2).to(dtype)

    @torch.no_grad()
    def grid_of(self, weight: Tensor) -> tuple[Tensor, Tensor]:
        return self.grid.store(self._step()), self.zero_point

    @torch.no_grad()
    def reset(self) -> None:
        self.factors.fill_(1.0)

    def _step(self) -> Tensor:
        return self.factors.clamp(min=SMALLEST_FACTOR) * self.start


def _logit(start: Tensor, extreme: Tensor, limit: float) -> Tensor:
    """The logit at which ``sigmoid(logit) * extreme`` is the start, at most ``limit``."""
    ratio = torch.where(extreme == 0, 1.0, start / torch.where(extreme == 0, 1.0, extreme))
    return torch.logit(ratio.clamp(1e-3, 1)).clamp(max=limit)
