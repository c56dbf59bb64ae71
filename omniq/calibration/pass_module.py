# SPDX-License-Identifier: Apache-2.0
"""The LightningModule of one fit: a stage that makes passes over the samples of a task.

The callbacks in ``omniq.callbacks`` rely on this interface. The blocks and streams of the task are frozen, already in
place, and not part of a checkpoint. Lightning assumes the opposite in three places; ``task``, ``cpu`` and
``transfer_batch_to_device`` each change one of them.
"""

import math
import time
from abc import abstractmethod
from collections.abc import Mapping
from functools import cached_property
from typing import Any, Generic, Protocol, TypeVar

import lightning as L
import torch
from torch import Tensor
from typing_extensions import Self

from omniq.calibration.loader import PassLoader
from omniq.distributed import collectives
from omniq.errors import UserError


class Task(Protocol):
    """The attributes of a task that the callbacks of a fit use."""

    inputs: Tensor
    notes: dict[str, Any]
    result: Any

    @property
    def index(self) -> int | None:
        """The position of the block; None for the whole model."""

    @property
    def name(self) -> str:
        """The prefix of all logged values, such as ``block/007``."""

    @property
    def label(self) -> str:
        """The name of the task in messages, such as ``block 7``."""

    @property
    def device(self) -> torch.device:
        """The device of the computation."""

    @property
    def export_dtype(self) -> torch.dtype:
        """The dtype of exported parameters."""


AnyTask = TypeVar("AnyTask", bound=Task)


class PassModule(L.LightningModule, Generic[AnyTask]):
    """One stage at work on one task; ``state_dict()`` holds the learned parameters.

    Args:
        task: the task.

    Attributes:
        save_interval: minimum time between two pauses in seconds, for stages whose passes take milliseconds.
        pausing: True if callbacks read the losses and save the fit after the current step.
    """

    save_interval = 0.0

    def __init__(self, task: AnyTask) -> None:
        super().__init__()
        # In a tuple, because torch registers a module assigned to an attribute as a submodule. The block would become
        # part of state_dict(), of parameters() and of DDP's buckets.
        self._outside = (task,)
        self.tracked: list[tuple[str, Tensor]] = []
        self.pausing, self._paused_at = False, -math.inf

    @property
    def task(self) -> AnyTask:
        """The task of this fit."""
        return self._outside[0]

    def cpu(self) -> Self:
        """Do nothing. Lightning moves a module to the CPU after the fit, but ``finish`` needs it on the device."""
        return self

    def transfer_batch_to_device(self, batch: Any, device: torch.device, dataloader_idx: int) -> Any:
        """Keep sample indices on the device of the streams.

        Lightning would move them to the GPU. Indexing a stream in host memory would then wait for the GPU.
        """
        return super().transfer_batch_to_device(batch, self.task.inputs.device, dataloader_idx)

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
    def finish(self) -> Any:
        """Return the result of the stage."""

    def can_resume(self, checkpoint: Mapping[str, Any]) -> bool:
        """True if a saved fit of this stage matches the current layout of this task."""
        return True

    def restored(self) -> None:
        """Called after a guard has restored an earlier state: discard all values derived from the later state."""

    def abandon(self) -> str:
        """Stop learning after repeated non-finite losses or a non-finite result, and return to the initial state.

        Returns:
            one line for the summary that names the state to which the task returns.

        Raises:
            UserError: the stage has no initial state to which the task can return.
        """
        stage = type(self).__name__.removesuffix("Module")
        raise UserError(
            f"{self.task.label}: {stage} produced non-finite values and has no initial state to return to: "
            "set another trainer.precision, or set scheme.dtype to bfloat16 or float32"
        )
