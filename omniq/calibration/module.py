# SPDX-License-Identifier: Apache-2.0
"""The LightningModule that runs one stage on one block."""

from abc import abstractmethod

from torch import Tensor

from omniq.blocks.placement import gather_samples
from omniq.calibration.pass_module import PassModule
from omniq.calibration.task import BlockTask
from omniq.storage.block_result import BlockResult


class BlockModule(PassModule[BlockTask]):
    """One stage at work on one block; ``state_dict()`` holds the learned parameters."""

    def batch(self, indices: Tensor) -> tuple[Tensor, Tensor]:
        """Inputs and targets of these samples on the block's device, each ``[batch, t, h]``."""
        task = self.task
        return gather_samples(task.inputs, indices, task.device), gather_samples(task.targets, indices, task.device)

    @abstractmethod
    def finish(self) -> BlockResult:
        """Return the final codes, rounded in float32 on storage-rounded scales; ``task.block`` stays full-precision."""
