# SPDX-License-Identifier: Apache-2.0
"""Round to nearest: every weight goes to the nearest point of its grid, without looking at what the layer computes.

The baseline of every table. With min-max clipping it needs no data; with a searched range it uses the mean square of
each input.
"""

from omniq.calibration.rounding import RTNModule
from omniq.calibration.stage import Stage
from omniq.calibration.task import BlockTask
from omniq.quantizers.clipping import MinMax, RangeEstimator


class RTN(Stage):
    """Round to nearest.

    Args:
        clipping: the range of each group; min-max by default.
    """

    def __init__(self, clipping: RangeEstimator | None = None) -> None:
        self.clipping = clipping or MinMax()

    def module(self, task: BlockTask) -> "RTNModule":
        return RTNModule(task, self.clipping)
