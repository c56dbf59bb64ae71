# SPDX-License-Identifier: Apache-2.0
"""``FromCheckpointModule``: hands on the result that the run has read for this block."""

from omniq.calibration.rounding import RTNModule
from omniq.calibration.task import BlockTask
from omniq.quantizers.clipping import MinMax
from omniq.storage.block_result import BlockResult


class FromCheckpointModule(RTNModule):
    """Its single training step does nothing."""

    def __init__(self, task: BlockTask) -> None:
        super().__init__(task, MinMax())

    def finish(self) -> BlockResult:
        result = self.task.result
        if result is None:
            raise RuntimeError(f"{self.task.label}: the run has read no finished block")
        return result
