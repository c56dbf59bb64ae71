# SPDX-License-Identifier: Apache-2.0
"""The LightningModule that runs one stage on one block."""

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
    """One stage at work on one block; ``state_dict()`` holds the learned parameters.

    Args:
        task: the block, its streams and its grid.

    Attributes:
        save_interval: minimum time between two pauses in seconds, for stages whose passes take milliseconds.
        pausing: True if callbacks read the losses and save the fit after the current step.
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
        """Decide for all callbacks whether they pause after this step: at the end of a pass, if the interval is over.

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
        """The loader of this fit, created once."""
        return self.loader()

    @abstractmethod
    def loader(self) -> PassLoader:
        """A new loader over the batches of the whole stage, in order."""

    @abstractmethod
    def finish(self) -> BlockResult:
        """Return the final codes, rounded in float32 on storage-rounded scales; ``task.block`` stays full-precision."""

    def can_resume(self, checkpoint: Mapping[str, Any]) -> bool:
        """True if a saved fit of this stage matches the current layout of this block."""
        return True

    def restored(self) -> None:
        """Called after a guard has restored an earlier state: discard all values derived from the later state."""

    def abandon(self) -> str:
        """Stop learning after repeated non-finite losses or a non-finite result, and return to the initial state.

        Returns:
            one line for the summary that names the state to which the block returns.

        Raises:
            UserError: the stage has no initial state to which the block can return.
        """
        stage = type(self).__name__.removesuffix("Module")
        raise UserError(
            f"block {self.task.index}: {stage} produced non-finite values and has no initial state to return to: "
            "set another trainer.precision, or set scheme.dtype to bfloat16 or float32"
        )
