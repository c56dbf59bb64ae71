# SPDX-License-Identifier: Apache-2.0
"""Clipping: the range of the weights that the grid covers.

``MinMax`` and ``Searched`` compute a range once. ``LWC`` learns a range by gradient, starting from either: OmniQuant
(arXiv 2308.13137, section 3.2, learnable weight clipping) shrinks the extremes of each group by learned factors,

    hi = sigmoid(upper) * max(w),   lo = sigmoid(lower) * min(w),   s = (hi - lo) / L,   z = round(-lo / s)

All share one interface, so a stage takes any of them from YAML. PACT and LSQ, for comparison, are in
``omniq.quantizers.absolute``.

Deviations from the published code: the range always includes zero, so the zero point stays inside the code range; the
final grid is computed in float32.

Shapes: ``o`` output features, ``i`` input features, ``G`` groups.
"""

from abc import ABC, abstractmethod
from typing import Literal

import torch
from torch import Tensor, nn

from omniq.grid.affine import Grid
from omniq.kernels.fake_quant import fake_quantize
from omniq.kernels.scaled_weight import ScaledWeight
from omniq.quantizers.search import search_range

INITIAL_LOGIT = 4.0  # sigmoid(4) = 0.982: OmniQuant's start, a 1.8 % shrink (its code; the paper does not say)
OPEN_LOGIT = 40.0  # sigmoid(40) is 1 in float32


class Clipping(ABC):
    """Builds the clipping of each linear for a stage; named in YAML."""

    @property
    def needs_second_moment(self) -> bool:
        """True if ``build`` needs the mean square of the inputs."""
        return False

    @property
    def needs_gram(self) -> bool:
        """True if ``build`` needs the whole Gram matrix of the inputs instead."""
        return False

    @abstractmethod
    def build(self, weight: Tensor, grid: Grid, second_moment: Tensor | None) -> "FakeQuantWeight":
        """The clipping of one linear; arguments as in ``RangeEstimator.range``."""


class RangeEstimator(Clipping):
    """Chooses the range of each group once. In a stage that learns, the fraction of min-max stays fixed."""

    @abstractmethod
    def range(self, weight: Tensor, grid: Grid, second_moment: Tensor | None) -> tuple[Tensor, Tensor]:
        """Range of each group.

        Args:
            weight: ``[o, i]``.
            grid: bits, group size and symmetry.
            second_moment: mean square of each input, ``[i]`` (the diagonal of the Gram matrix); or that matrix,
                ``[i, i]``, if ``needs_gram``.

        Returns:
            ``lo <= 0 <= hi``, each float32 ``[o, G]``.

        Raises:
            ValueError: second moments are needed and not given, or have another shape.
        """

    def build(self, weight: Tensor, grid: Grid, second_moment: Tensor | None) -> "FakeQuantWeight":
        clip = LWCWeight(weight, grid, self.range(weight, grid, second_moment), OPEN_LOGIT)
        return clip.requires_grad_(False)


class MinMax(RangeEstimator):
    """The smallest and largest weight of the group."""

    def range(self, weight: Tensor, grid: Grid, second_moment: Tensor | None) -> tuple[Tensor, Tensor]:
        return grid.range(weight.float())


class Searched(RangeEstimator):
    """The shrunken range of the least rounding error, with each input weighted by its second moment.

    Minimises ``sum_j S_jj (w_j - Q(w_j))^2``, the diagonal of the layer's reconstruction error; or ``d S d^T`` within a
    group, the whole of it.

    Args:
        weighting: ``diagonal`` suits stages that compensate for errors (GPTQ, coordinate descent); ``gram`` suits
            plain rounding and learned clipping per channel.
    """

    def __init__(self, weighting: Literal["diagonal", "gram"] = "diagonal") -> None:
        self.weighting = weighting

    @property
    def needs_second_moment(self) -> bool:
        return True

    @property
    def needs_gram(self) -> bool:
        return self.weighting == "gram"

    def range(self, weight: Tensor, grid: Grid, second_moment: Tensor | None) -> tuple[Tensor, Tensor]:
        if second_moment is None:
            raise ValueError("a searched range needs second_moment, the mean square of each input")
        return search_range(weight.float(), grid, second_moment.float())


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


class LearnableRange(Clipping):
    """A clipping that is learned, from an initial range.

    Args:
        initial: the range to start from; min-max by default.
    """

    def __init__(self, initial: RangeEstimator | None = None) -> None:
        self.initial = initial or MinMax()

    @property
    def needs_second_moment(self) -> bool:
        return self.initial.needs_second_moment

    @property
    def needs_gram(self) -> bool:
        return self.initial.needs_gram


class LWC(LearnableRange):
    """Learnable weight clipping; from min-max it starts 1.8 % inside, as published."""

    def build(self, weight: Tensor, grid: Grid, second_moment: Tensor | None) -> FakeQuantWeight:
        return LWCWeight(weight, grid, self.initial.range(weight, grid, second_moment))


def _logit(start: Tensor, extreme: Tensor, limit: float) -> Tensor:
    """The logit at which ``sigmoid(logit) * extreme`` is the start, at most ``limit``."""
    ratio = torch.where(extreme == 0, 1.0, start / torch.where(extreme == 0, 1.0, extreme))
    return torch.logit(ratio.clamp(1e-3, 1)).clamp(max=limit)
