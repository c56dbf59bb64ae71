# SPDX-License-Identifier: Apache-2.0
"""Clipping: which range of the weights the grid covers.

``MinMax`` and ``Searched`` compute a range once. The others learn one by gradient, starting from either:

    LWC    hi = sigmoid(upper) * max(w),   lo = sigmoid(lower) * min(w)        OmniQuant, arXiv 2308.13137, equation 3
    PACT   hi = u * hi_0,                  lo = l * lo_0                        arXiv 1805.06085
    LSQ    s = f * s_0,                    z = z_0                              arXiv 1902.08153

LWC's factors are relative to the weights as they are, so that its range follows a transform; PACT's thresholds and
LSQ's step are absolute, which is what the paper's ablation holds against them. PACT's thresholds get a gradient from
the weights beyond them only, LSQ's step also from the rounding of those inside.

All share one interface, so a stage takes any of them from YAML. Deviations from the published codes: the range always
includes zero, so the zero point stays inside the code range; the final grid is computed in float32. PACT and LSQ learn
factors on their start instead of thresholds and steps, so that one learning rate suits weights of any size; LSQ's
gradient scale is left out, because AdamW would cancel it.

Shapes: ``o`` output features, ``i`` input features, ``G`` groups.
"""

from abc import ABC, abstractmethod

import torch
from torch import Tensor, nn

from omniq.kernels.fake_quant import fake_quantize
from omniq.quantizers.grid import Grid
from omniq.quantizers.search import search_range

INITIAL_LOGIT = 4.0  # sigmoid(4) = 0.982: OmniQuant's start, a 1.8 % shrink (its code; the paper does not say)
OPEN_LOGIT = 40.0  # sigmoid(40) is 1 in float32
SMALLEST_FACTOR = 1e-2  # of a learned step or threshold: an optimizer step must not turn it over


class ClippingMethod(ABC):
    """How a stage that learns gets the clipping of each linear, named in YAML."""

    @property
    def needs_importance(self) -> bool:
        """Whether the mean square of the inputs is wanted."""
        return False

    @abstractmethod
    def build(self, weight: Tensor, grid: Grid, importance: Tensor | None) -> "LearnableClip":
        """The clipping of one linear; arguments as in ``Clipping.range``."""


class Clipping(ClippingMethod):
    """A way to choose the range of each group once. In a stage that learns, its share of min-max stays fixed."""

    @abstractmethod
    def range(self, weight: Tensor, grid: Grid, importance: Tensor | None) -> tuple[Tensor, Tensor]:
        """Range of each group.

        Args:
            weight: ``[o, i]``.
            grid: bits, group size and symmetry.
            importance: mean square of each input, ``[i]`` (the diagonal of the Gram matrix), where it was asked for.

        Returns:
            ``lo <= 0 <= hi``, each float32 ``[o, G]``.
        """

    def build(self, weight: Tensor, grid: Grid, importance: Tensor | None) -> "LearnableClip":
        clip = LearnedClip(weight, grid, self.range(weight, grid, importance), OPEN_LOGIT)
        return clip.requires_grad_(False)


class MinMax(Clipping):
    """The smallest and largest weight of the group."""

    def range(self, weight: Tensor, grid: Grid, importance: Tensor | None) -> tuple[Tensor, Tensor]:
        return grid.range(weight.float())


class Searched(Clipping):
    """The shrunken range of least rounding error, each input weighted by its mean square.

    Minimises ``sum_j H_jj (w_j - Q(w_j))^2``, the diagonal of the layer's reconstruction error.
    """

    @property
    def needs_importance(self) -> bool:
        return True

    def range(self, weight: Tensor, grid: Grid, importance: Tensor | None) -> tuple[Tensor, Tensor]:
        if importance is None:
            raise ValueError("a searched range needs the mean square of each input")
        return search_range(weight.float(), grid, importance.float())


class LearnableClip(nn.Module, ABC):
    """The clipping of one linear in the hands of a stage: fake-quantizes its weight and knows its grid."""

    @abstractmethod
    def forward(self, weight: Tensor, dtype: torch.dtype, moving: bool = False) -> Tensor:
        """The fake-quantized weight, differentiable in the clipping.

        Args:
            weight: ``[o, i]``.
            dtype: of the result.
            moving: whether a transform changes the weight from call to call (it is then differentiable too).
        """

    @abstractmethod
    def grid_of(self, weight: Tensor) -> tuple[Tensor, Tensor]:
        """Final scale and zero point, each ``[o, G]``: float32, on storage-rounded scales."""

    @abstractmethod
    def reset(self) -> None:
        """Back to the start."""


class LearnedClip(LearnableClip):
    """Learnable weight clipping of one linear.

    Args:
        weight: ``[o, i]``, for the extremes of its groups.
        grid: bits, group size and symmetry.
        start: range to start from, ``(lo, hi)`` of shape ``[o, G]``.
        limit: largest logit at the start.
    """

    lo: Tensor
    hi: Tensor
    start: Tensor

    def __init__(
        self, weight: Tensor, grid: Grid, start: tuple[Tensor, Tensor], limit: float = INITIAL_LOGIT
    ) -> None:
        super().__init__()
        lo, hi = grid.range(weight.float())
        for name, value in (("lo", lo), ("hi", hi)):
            self.register_buffer(name, value, persistent=False)
        initial = torch.stack([_logit(start[0], lo, limit), _logit(start[1], hi, limit)])  # [2, o, G]
        self.register_buffer("start", initial, persistent=False)
        self.grid = grid
        self.lower = nn.Parameter(initial[0].clone())
        self.upper = nn.Parameter(initial[1].clone())

    def forward(self, weight: Tensor, dtype: torch.dtype, moving: bool = False) -> Tensor:
        lo, hi = (None, None) if moving else (self.lo, self.hi)
        return fake_quantize(weight, lo, hi, self.upper, self.lower, self.grid, dtype)

    @torch.no_grad()
    def grid_of(self, weight: Tensor) -> tuple[Tensor, Tensor]:
        lo, hi = self.grid.range(weight.float())
        return self.grid.fit(self.lower.sigmoid() * lo, self.upper.sigmoid() * hi)

    @torch.no_grad()
    def reset(self) -> None:
        self.lower.copy_(self.start[0])
        self.upper.copy_(self.start[1])


class LWC(ClippingMethod):
    """Learnable weight clipping, started from a range.

    Args:
        initial: the range to start from; by default the published start, min-max shrunk by 1.8 %.
    """

    def __init__(self, initial: Clipping | None = None) -> None:
        self.initial = initial or MinMax()

    @property
    def needs_importance(self) -> bool:
        return self.initial.needs_importance

    def build(self, weight: Tensor, grid: Grid, importance: Tensor | None) -> LearnableClip:
        return LearnedClip(weight, grid, self.initial.range(weight, grid, importance))


class _Ablation(ClippingMethod):
    """A clipping that learns factors on a start.

    Args:
        initial: the range to start from; min-max by default.
    """

    def __init__(self, initial: Clipping | None = None) -> None:
        self.initial = initial or MinMax()

    @property
    def needs_importance(self) -> bool:
        return self.initial.needs_importance


class PACT(_Ablation):
    """Learned thresholds, for comparison with LWC."""

    def build(self, weight: Tensor, grid: Grid, importance: Tensor | None) -> LearnableClip:
        return ThresholdClip(grid, torch.stack(self.initial.range(weight, grid, importance)))


class LSQ(_Ablation):
    """A learned step, for comparison with LWC."""

    def build(self, weight: Tensor, grid: Grid, importance: Tensor | None) -> LearnableClip:
        return StepClip(grid, *grid.fit(*self.initial.range(weight, grid, importance)))


class ThresholdClip(LearnableClip):
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

    def forward(self, weight: Tensor, dtype: torch.dtype, moving: bool = False) -> Tensor:
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


class StepClip(LearnableClip):
    """LSQ of one linear.

    Args:
        grid: bits, group size and symmetry.
        step: the scale to start from, float32 ``[o, G]``.
        zero_point: stays, ``[o, G]``.
    """

    start: Tensor
    zero_point: Tensor

    def __init__(self, grid: Grid, step: Tensor, zero_point: Tensor) -> None:
        super().__init__()
        self.grid = grid
        self.register_buffer("start", step, persistent=False)
        self.register_buffer("zero_point", zero_point, persistent=False)
        self.factors = nn.Parameter(torch.ones_like(step))

    def forward(self, weight: Tensor, dtype: torch.dtype, moving: bool = False) -> Tensor:
        step, zero = self._step().unsqueeze(-1), self.zero_point.unsqueeze(-1)  # [o, G, 1]
        steps = self.grid.split(weight.float()) / step
        rounded = steps + (steps.round() - steps).detach()
        return (((rounded + zero).clamp(0, self.grid.levels) - zero) * step).flatten(-2).to(dtype)

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
