# SPDX-License-Identifier: Apache-2.0
"""The LightningModule of one stage on one block."""

import math
import time
from abc import abstractmethod
from functools import cached_property
from typing import Any

import lightning as L
import torch
from torch import Tensor
from typing_extensions import Self

from omniq.blocks.placement import gather_samples
from omniq.calibration.loader import PassLoader
from omniq.calibration.task import BlockTask
from omniq.distributed import collectives
from omniq.errors import UserError
from omniq.storage.block_result import BlockResult


class BlockModule(L.LightningModule):
    """One block in the hands of one stage.

    The block itself is kept out of the module tree: it is frozen, already on its device, and not part of a checkpoint.
    What remains in ``state_dict()`` is what the stage learns.
    """

    save_interval = 0.0

    def __init__(self, task: BlockTask) -> None:
        super().__init__()
        self._outside = (task,)
        self.tracked: list[tuple[str, Tensor]] = []
        self._paused, self._paused_at = (0, False), -math.inf

    @property
    def task(self) -> BlockTask:
        """The block, its streams and its grids."""
        return self._outside[0]

    def batch(self, indices: Tensor) -> tuple[Tensor, Tensor]:
        """Inputs and targets of these samples on the block's device, each ``[batch, t, h]``."""
        task = self.task
        return gather_samples(task.inputs, indices, task.device), gather_samples(task.targets, indices, task.device)

    def cpu(self) -> Self:
        """Stays: Lightning would take what was learned to the host when the fit ends, and ``finish`` wants it here."""
        return self

    def transfer_batch_to_device(self, batch: Any, device: torch.device, dataloader_idx: int) -> Any:
        """Indices go to where the streams are: a GPU would have to be asked for them again if those are on the host."""
        return super().transfer_batch_to_device(batch, self.task.inputs.device, dataloader_idx)

    def pauses_after(self, step: int) -> bool:
        """Whether losses are read and the fit is saved after this step (from 1): where a pass ends.

        Stages whose passes last milliseconds wait ``save_interval`` seconds in between; what is saved when changes
        nothing about the result.
        """
        if self._paused[0] != step:
            now = time.monotonic()
            waited = collectives.world_size() > 1 or now - self._paused_at >= self.save_interval  # processes must agree
            self._paused = (step, waited and self.batches.ends_pass(step))
            self._paused_at = now if self._paused[1] else self._paused_at
        return self._paused[1]

    def track(self, name: str, value: Tensor) -> None:
        """Record a scalar of this step, such as ``loss``; it stays on the device until the pass ends."""
        self.tracked.append((name, value.detach()))

    @cached_property
    def batches(self) -> PassLoader:
        """The one loader of this fit."""
        return self.loader()

    @abstractmethod
    def loader(self) -> PassLoader:
        """A new loader over the batches of the whole stage, in order."""

    @abstractmethod
    def finish(self) -> BlockResult:
        """Round for the last time, in float32 on storage-rounded scales; leave ``task.block`` in full precision."""

    def restored(self) -> None:
        """Called after a guard has put an earlier state back: forget whatever was derived from the other one."""

    def abandon(self) -> str:
        """Give up learning, after repeated non-finite losses or such an end: go back to where the stage began.

        Returns:
            one line for the summary that says what the block falls back to.

        Raises:
            UserError: there is nothing to go back to.
        """
        stage = type(self).__name__.removesuffix("Module")
        raise UserError(
            f"block {self.task.index}: {stage} met values that are not finite, and has no start to return to: "
            "give another trainer.precision, or bfloat16 or float32 as scheme.dtype"
        )
