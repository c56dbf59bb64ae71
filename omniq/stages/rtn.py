# SPDX-License-Identifier: Apache-2.0
"""Round to nearest (RTN): round every weight to the nearest point of its grid, independently of the layer's output.

    q = clamp(round(w / s) + z, 0, 2^b - 1)

Every results table has this baseline. Min-max clipping needs no calibration data; a searched range uses the mean square
of each input.
"""

from typing import TYPE_CHECKING

from omniq.calibration.stage import Stage
from omniq.quantizers.clipping import MinMax, RangeEstimator

if TYPE_CHECKING:  # settings are parsed without torch
    from omniq.calibration.module import BlockModule
    from omniq.calibration.task import BlockTask


class RTN(Stage):
    """Round to nearest.

    Args:
        clipping: how to choose the range of each group; min-max by default.
    """

    def __init__(self, clipping: RangeEstimator | None = None) -> None:
        self.clipping = clipping or MinMax()

    def module(self, task: "BlockTask") -> "BlockModule":
        from omniq.calibration.rounding import RTNModule

        return RTNModule(task, self.clipping)
