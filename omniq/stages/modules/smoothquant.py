# SPDX-License-Identifier: Apache-2.0
"""``SmoothQuantModule``; the equations are in ``omniq.stages.smoothquant``."""

import torch

from omniq.calibration.fuse import block_transform, fuse, input_ranges
from omniq.calibration.rounding import RTNModule
from omniq.calibration.task import BlockTask
from omniq.stages.smoothquant import SmoothQuant
from omniq.storage.block_result import BlockResult


class SmoothQuantModule(RTNModule):
    """Smooths one block and rounds it once."""

    def __init__(self, task: BlockTask, settings: SmoothQuant) -> None:
        super().__init__(task, settings.clipping)
        self.settings = settings

    @torch.no_grad()
    def finish(self) -> BlockResult:
        task = self.task
        transform = block_transform(task, self.settings.equivalences, shift=False)
        tensors = dict(task.block.named_parameters())
        values = transform.initial(tensors, input_ranges(task), self.settings.alpha, shift=False)
        fuse(task.block, transform, transform.parameters(values).to(task.device))
        return super().finish()
