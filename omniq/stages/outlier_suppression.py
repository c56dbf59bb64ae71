# SPDX-License-Identifier: Apache-2.0
"""Outlier Suppression+ (arXiv 2304.09145): center channels by shifts, scale outliers down, then round to nearest.

For the inputs ``X`` of linears ``W`` with channel ranges ``[lo_j, hi_j]`` and a threshold ``t``:

    d_j = (hi_j + lo_j) / 2                                          shift
    s_j = max(1, max|x_j - d_j| / t)                                 scale: changes only channels beyond t
    t   = argmin || Q((X - d) / s) Q(W s)^T - (X - d) W^T ||^2       over a few samples, independently for each input

1. Measure the channel ranges on the quantized stream, and compute the shifts.
2. Try evenly spaced thresholds, from the largest channel down. The first one leaves all scales at one.
3. Fuse shifts and scales into the block, then round to nearest.

The stage uses no gradients. Alone, it is the baseline of this name; before another stage, it prepares the block.
Several processes use the same samples as a single process: each evaluates the samples that it holds, and the errors are
summed.

Deviations: shifts are used only where the stock module can store the resulting biases (in LLaMA from values to output),
instead of a norm with its own bias. The objective is summed over all readers of an input, as published for q, k and v.

"""

from collections.abc import Sequence
from typing import TYPE_CHECKING

from omniq.calibration.settings import check_equivalences
from omniq.calibration.stage import Part, Stage
from omniq.errors import UserError
from omniq.quantizers.clipping import MinMax, RangeEstimator

if TYPE_CHECKING:  # settings are parsed without torch
    from omniq.calibration.module import BlockModule
    from omniq.calibration.task import BlockTask
    from omniq.grid.scheme import Activations
    from omniq.models.layout import Layout

KINDS = ("norm", "value_output")


class OutlierSuppression(Stage):
    """Shifts and searched scales, without learning.

    Args:
        candidates: number of thresholds to try for each input.
        samples: number of calibration samples for the search, over all processes.
        clipping: how to choose the range of each group of weights; min-max by default.

    Raises:
        UserError: ``candidates`` or ``samples`` is less than 1.
    """

    def __init__(self, candidates: int = 20, samples: int = 8, clipping: RangeEstimator | None = None) -> None:
        for name, value in (("candidates", candidates), ("samples", samples)):
            if value < 1:
                raise UserError(f"stages: OutlierSuppression.{name} {value} is too small: give 1 or more")
        self.candidates, self.samples, self.clipping = candidates, samples, clipping or MinMax()

    @property
    def leaves(self) -> frozenset[Part]:
        return frozenset({"block"})

    def check_layout(self, layout: "Layout") -> None:
        check_equivalences(layout, KINDS, "stages: OutlierSuppression")

    def equivalence_kinds(self, layout: "Layout", activations: "Activations") -> Sequence[str]:
        return KINDS

    def module(self, task: "BlockTask") -> "BlockModule":
        from omniq.stages.modules.outlier_suppression import OutlierSuppressionModule

        return OutlierSuppressionModule(task, self)
