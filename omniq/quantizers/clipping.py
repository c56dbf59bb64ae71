# SPDX-License-Identifier: Apache-2.0
"""Clipping: which range of the weights the grid covers.

``MinMax`` and ``Searched`` compute a range once. ``LWC`` learns one by gradient, starting from either: OmniQuant
(arXiv 2308.13137, equation 3) shrinks the extremes of each group by learned factors,

    hi = sigmoid(upper) * max(w),   lo = sigmoid(lower) * min(w),   s = (hi - lo) / L,   z = round(-lo / s)

All share one interface, so a stage takes any of them from YAML. Deviations from the published code: the range always
includes zero, so the zero point stays inside the code range; the final grid is computed in float32.

Shapes: ``o`` output features, ``i`` input features, ``G`` groups.
"""

from abc import ABC, abstractmethod
from typing import Protocol

import torch
from torch import Tensor, nn

from omniq.kernels.fake_quant import fake_quantize
from omniq.quantizers.grid import Grid
from omniq.quantizers.search import search_range

INITIAL_LOGIT = 4.0  # sigmoid(4) = 0.982: OmniQuant's start, a 1.8 % shrink (its code; the paper does not say)


class Clipping(ABC):
    """A way to choose the range of each group, named in YAML."""

    needs_importance = False

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


class MinMax(Clipping):
    """The smallest and largest weight of the group."""

    def range(self, weight: Tensor, grid: Grid, importance: Tensor | None) -> tuple[Tensor, Tensor]:
        return grid.range(weight.float())


class Searched(Clipping):
    """The shrunken range of least rounding error, each input weighted by its mean square.

    Minimises ``sum_j H_jj (w_j - Q(w_j))^2``, the diagonal of the layer's reconstruction error.
    """

    needs_importance = True

    def range(self, weight: Tensor, grid: Grid, importance: Tensor | None) -> tuple[Tensor, Tensor]:
        if importance is None:
            raise ValueError("a searched range needs the mean square of each input")
        return search_range(weight.float(), grid, importance.float())


class LearnableClip(Protocol):
    """What a stage trains: a module that fake-quantizes one weight and knows its grid."""

    def __call__(self, weight: Tensor, dtype: torch.dtype) -> Tensor: ...

    def grid_of(self, weight: Tensor) -> tuple[Tensor, Tensor]: ...

    def reset(self) -> None: ...


class LearnedClip(nn.Module):
    """Learnable weight clipping of one linear.

    Args:
        weight: ``[o, i]``, for the extremes of its groups.
        grid: bits, group size and symmetry.
        start: range to start from, ``(lo, hi)`` of shape ``[o, G]``.
    """

    lo: Tensor
    hi: Tensor
    start: Tensor

    def __init__(self, weight: Tensor, grid: Grid, start: tuple[Tensor, Tensor]) -> None:
        super().__init__()
        lo, hi = grid.range(weight.float())
        for name, value in (("lo", lo), ("hi", hi)):
            self.register_buffer(name, value, persistent=False)
        initial = torch.stack([_logit(start[0], lo), _logit(start[1], hi)])  # [2, o, G]
        self.register_buffer("start", initial, persistent=False)
        self.grid = grid
        self.lower = nn.Parameter(initial[0].clone())
        self.upper = nn.Parameter(initial[1].clone())

    def forward(self, weight: Tensor, dtype: torch.dtype) -> Tensor:
        """The fake-quantized weight, ``[o, i]`` in ``dtype``, differentiable in the clipping."""
        return fake_quantize(weight, self.lo, self.hi, self.upper, self.lower, self.grid, dtype)

    @torch.no_grad()
    def grid_of(self, weight: Tensor) -> tuple[Tensor, Tensor]:
        """Final scale and zero point, each ``[o, G]``: float32, on storage-rounded scales."""
        return self.grid.fit(self.lower.sigmoid() * self.lo, self.upper.sigmoid() * self.hi)

    @torch.no_grad()
    def reset(self) -> None:
        """Back to the start."""
        self.lower.copy_(self.start[0])
        self.upper.copy_(self.start[1])


class LWC:
    """Learnable weight clipping, started from a range.

    Args:
        initial: the range to start from; by default the published start, min-max shrunk by 1.8 %.
    """

    def __init__(self, initial: Clipping | None = None) -> None:
        self.initial = initial or MinMax()

    @property
    def needs_importance(self) -> bool:
        """Whether ``build`` wants the mean square of the inputs."""
        return self.initial.needs_importance

    def build(self, weight: Tensor, grid: Grid, importance: Tensor | None) -> LearnedClip:
        """The trainable clipping of one linear; shapes as in ``Clipping.range``."""
        return LearnedClip(weight, grid, self.initial.range(weight, grid, importance))


def _logit(start: Tensor, extreme: Tensor) -> Tensor:
    """The logit at which ``sigmoid(logit) * extreme`` is the start; at most the published start of 4."""
    ratio = torch.where(extreme == 0, 1.0, start / torch.where(extreme == 0, 1.0, extreme))
    return torch.logit(ratio.clamp(1e-3, 1 - 1e-6)).clamp(max=INITIAL_LOGIT)
