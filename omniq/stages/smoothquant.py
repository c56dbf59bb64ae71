# SPDX-License-Identifier: Apache-2.0
"""SmoothQuant (arXiv 2211.10438): move part of the activations' range into the weights, then round to nearest.

For every input channel ``j`` (equation 4):

    s_j = max|x_j|^alpha / max|W_j|^(1 - alpha),      x_j <- x_j / s_j,      W_j <- W_j s_j

1. Measure the range of each input on the quantized stream, without quantized activations.
2. Compute the scales (``omniq.transforms.initial``) and fuse them into the norm, or into the other module that makes
   the input, and into the weights.
3. Round to nearest.

The stage uses no gradients. Alone, it is the baseline of this name. Before another stage (GPTQ, QuantEase, OmniQuant),
it only prepares the block, and the other stage replaces its codes.
"""

from collections.abc import Sequence
from typing import TYPE_CHECKING

from omniq.calibration.settings import check_equivalences
from omniq.calibration.stage import Part, Stage
from omniq.quantizers.clipping import MinMax, RangeEstimator
from omniq.transforms.let import MEASURED_KINDS, check_alpha, check_kinds

if TYPE_CHECKING:  # settings are parsed without torch
    from omniq.calibration.module import BlockModule
    from omniq.calibration.task import BlockTask
    from omniq.grid.scheme import Activations
    from omniq.models.layout import Layout


class SmoothQuant(Stage):
    """Scales from maxima, without learning.

    Args:
        alpha: migration strength: the fraction of the activations' range to move into the weights, from 0 to 1.
        equivalences: where to move it: ``norm`` (as in the paper), ``value_output``, ``up_down``.
        clipping: how to choose the range of each group of weights; min-max by default.

    Raises:
        UserError: ``alpha`` is outside 0 to 1, or ``equivalences`` is empty, repeats a kind, or has a kind whose scales
            do not follow from maxima.
    """

    def __init__(
        self, alpha: float = 0.5, equivalences: Sequence[str] = ("norm",), clipping: RangeEstimator | None = None
    ) -> None:
        check_alpha(alpha)
        check_kinds(equivalences, "stages: SmoothQuant.equivalences", MEASURED_KINDS)
        self.alpha, self.equivalences, self.clipping = alpha, tuple(equivalences), clipping or MinMax()

    @property
    def leaves(self) -> frozenset[Part]:
        return frozenset({"block"})

    def check_layout(self, layout: "Layout") -> None:
        check_equivalences(layout, self.equivalences, "stages: SmoothQuant.equivalences")

    def equivalence_kinds(self, layout: "Layout", activations: "Activations") -> Sequence[str]:
        return self.equivalences

    def module(self, task: "BlockTask") -> "BlockModule":
        from omniq.stages.modules.smoothquant import SmoothQuantModule

        return SmoothQuantModule(task, self)
