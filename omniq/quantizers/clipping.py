# SPDX-License-Identifier: Apache-2.0
"""Clipping: the range of the weights that the grid covers.

``MinMax`` and ``Searched`` compute a range once. ``LWC`` learns a range by gradient, starting from either: OmniQuant
(arXiv 2308.13137, learnable weight clipping) shrinks the extremes of each group by learned factors,

    hi = sigmoid(upper) * max(w),   lo = sigmoid(lower) * min(w),   s = (hi - lo) / L,   z = round(-lo / s)

All share one interface, so a stage takes any of them from YAML. PACT and LSQ, for comparison, are in
``omniq.quantizers.absolute``. This module holds settings and does not import torch; the learned parameters of a linear
are in ``omniq.quantizers.fake_quant_weight``.

Deviations from the published code: the range always includes zero, so the zero point stays inside the code range; the
final grid is computed in float32.

Shapes: ``o`` output features, ``i`` input features, ``G`` groups.
"""

from abc import ABC, abstractmethod
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    from torch import Tensor

    from omniq.grid.affine import Grid
    from omniq.quantizers.fake_quant_weight import FakeQuantWeight


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
    def build(self, weight: "Tensor", grid: "Grid", second_moment: "Tensor | None") -> "FakeQuantWeight":
        """The clipping of one linear; arguments as in ``RangeEstimator.range``."""


class RangeEstimator(Clipping):
    """Chooses the range of each group once. In a stage that learns, the fraction of min-max stays fixed."""

    @abstractmethod
    def range(self, weight: "Tensor", grid: "Grid", second_moment: "Tensor | None") -> "tuple[Tensor, Tensor]":
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

    def build(self, weight: "Tensor", grid: "Grid", second_moment: "Tensor | None") -> "FakeQuantWeight":
        from omniq.quantizers.fake_quant_weight import OPEN_LOGIT, LWCWeight

        clip = LWCWeight(weight, grid, self.range(weight, grid, second_moment), OPEN_LOGIT)
        return clip.requires_grad_(False)


class MinMax(RangeEstimator):
    """The smallest and largest weight of the group."""

    def range(self, weight: "Tensor", grid: "Grid", second_moment: "Tensor | None") -> "tuple[Tensor, Tensor]":
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

    def range(self, weight: "Tensor", grid: "Grid", second_moment: "Tensor | None") -> "tuple[Tensor, Tensor]":
        if second_moment is None:
            raise ValueError("a searched range needs second_moment, the mean square of each input")
        from omniq.quantizers.search import search_range

        return search_range(weight.float(), grid, second_moment.float())


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

    def build(self, weight: "Tensor", grid: "Grid", second_moment: "Tensor | None") -> "FakeQuantWeight":
        from omniq.quantizers.fake_quant_weight import LWCWeight

        return LWCWeight(weight, grid, self.initial.range(weight, grid, second_moment))
