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

from typing import TYPE_CHECKING

from omniq.quantizers.clipping import LearnableRange

if TYPE_CHECKING:
    from torch import Tensor

    from omniq.grid.affine import Grid
    from omniq.quantizers.fake_quant_weight import FakeQuantWeight


class PACT(LearnableRange):
    """Learned thresholds, for comparison with LWC."""

    def build(self, weight: "Tensor", grid: "Grid", second_moment: "Tensor | None") -> "FakeQuantWeight":
        from omniq.quantizers.fake_quant_weight import PACTWeight

        return PACTWeight(grid, *self.initial.range(weight, grid, second_moment))


class LSQ(LearnableRange):
    """A learned step, for comparison with LWC."""

    def build(self, weight: "Tensor", grid: "Grid", second_moment: "Tensor | None") -> "FakeQuantWeight":
        from omniq.quantizers.fake_quant_weight import LSQWeight

        return LSQWeight(grid, *grid.fit(*self.initial.range(weight, grid, second_moment)))
