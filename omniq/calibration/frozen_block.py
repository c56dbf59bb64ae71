# SPDX-License-Identifier: Apache-2.0
"""A LightningModule around a block that Lightning must not modify.

The block is frozen, already on its device, and not part of a checkpoint. The same holds for its streams. Lightning
assumes the opposite in three places; each override below changes one of them.
"""

from typing import Any

import lightning as L
import torch
from typing_extensions import Self

from omniq.calibration.task import BlockTask


class FrozenBlockModule(L.LightningModule):
    """A LightningModule that holds the learned parameters of a block, but not the block itself.

    Args:
        task: the block, its streams and its grids.
    """

    def __init__(self, task: BlockTask) -> None:
        super().__init__()
        # In a tuple, because torch registers a module assigned to an attribute as a submodule. The block would become
        # part of state_dict(), of parameters() and of DDP's buckets.
        self._outside = (task,)

    @property
    def task(self) -> BlockTask:
        """The block, its streams and its grids."""
        return self._outside[0]

    def cpu(self) -> Self:
        """Do nothing. Lightning moves a module to the CPU after the fit, but ``finish`` needs it on the device."""
        return self

    def transfer_batch_to_device(self, batch: Any, device: torch.device, dataloader_idx: int) -> Any:
        """Keep sample indices on the device of the streams.

        Lightning would move them to the GPU. Indexing a stream in host memory would then wait for the GPU.
        """
        return super().transfer_batch_to_device(batch, self.task.inputs.device, dataloader_idx)
