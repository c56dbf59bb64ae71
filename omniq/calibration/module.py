# SPDX-License-Identifier: Apache-2.0
"""The LightningModule of one stage on one block."""

import math
import time
from abc import abstractmethod
from collections.abc import Mapping
from functools import cached_property
from typing import Any

from torch import Tensor

from omniq.blocks.placement import gather_samples
from omniq.calibration.frozen_block import FrozenBlockModule
from omniq.calibration.loader import PassLoader
from omniq.calibration.task import BlockTask
from omniq.distributed import collectives
from omniq.errors import UserError
from omniq.storage.block_result import BlockResult


class BlockModule(FrozenBlockModule):
    """One block in the hands of one stage; ``state_dict()`` holds what the stage learns.

    Args:
        task: the block, its streams and its grid.

    Attributes:
        save_interval: seconds between two pauses, for stages whose passes last milliseconds.
        pausing: whether callbacks read the losses and save the fit after the current step.
    """

    save_interval = 0.0

    def __init__(self, task: BlockTask) -> None:
        super().__init__(task)
        self.tracked: list[tuple[str, Tensor]] = []
        self.pausing, self._paused_at = False, -math.inf

    def batch(self, indices: Tensor) -> tuple[Tensor, Tensor]:
        """Inputs and targets of these samples on the block's device, each ``[batch, t, h]``."""
        task = self.task
        return gather_samples(task.inputs, indices, task.device), gather_samples(task.targets, indices, task.device)

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        """Decide, once for all callbacks, whether they pause after this step: where a pass ends, if it is time.

        The time between two saves does not change the result.
        """
        now = time.monotonic()
        due = collectives.world_size() > 1 or now - self._paused_at >= self.save_interval  # processes must agree
        self.pausing = due and self.batches.ends_pass(batch_idx + 1)
        self._paused_at = now if self.pausing else self._paused_at

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

    def can_resume(self, checkpoint: Mapping[str, Any]) -> bool:
        """Whether a saved fit of this stage belongs to this block as it is laid out now."""
        return True

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
