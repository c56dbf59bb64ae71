# SPDX-License-Identifier: Apache-2.0
"""PACT and LSQ: clippings with absolute ranges, for comparison with LWC.

    PACT   hi = u * hi_0,   lo = l * lo_0        arXiv 1805.06085; gradient from the weights beyond a threshold only
    LSQ    s = f * s_0,     z = z_0              arXiv 1902.08153; gradient from the rounding of weights inside, too

LWC's factors are relative to the current weights, so its range follows a transform. These ranges stay where they are
while a transform changes the weights, which is the argument of OmniQuant's ablation against them.

Deviations from the published codes: the learned parameters are factors on the start instead of thresholds and steps, so
that one learning rate suits weights of any size; LSQ's gradient scale is left out, because AdamW would cancel it.

Shapes: ``o`` output features, ``i`` input features, ``G`` groups, ``g`` group size.
"""

import torch
from torch import Tensor, nn

from omniq.grid.affine import Grid
from omniq.kernels.scaled_weight import ScaledWeight, materialize
from omniq.quantizers.clipping import FakeQuantWeight, LearnableRange

SMALLEST_FACTOR = 1e-2  # on a learned step or threshold: an optimizer step must not change its sign


class PACT(LearnableRange):
    """Learned thresholds, for comparison with LWC."""

    def build(self, weight: Tensor, grid: Grid, second_moment: Tensor | None) -> FakeQuantWeight:
        return PACTWeight(grid, torch.stack(self.initial.range(weight, grid, second_moment)))


class LSQ(LearnableRange):
    """A learned step, for comparison with LWC."""

    def build(self, weight: Tensor, grid: Grid, second_moment: Tensor | None) -> FakeQuantWeight:
        return LSQWeight(grid, *grid.fit(*self.initial.range(weight, grid, second_moment)))


class PACTWeight(FakeQuantWeight):
    """PACT of one linear.

    Args:
        grid: bits, group size and symmetry.
        start: ``lo`` and ``hi``, float32 ``[2, o, G]``.
    """

    start: Tensor

    def __init__(self, grid: Grid, start: Tensor) -> None:
        super().__init__()
        self.grid = grid
        self.register_buffer("start", start, persistent=False)
        self.factors = nn.Parameter(torch.ones_like(start))

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
