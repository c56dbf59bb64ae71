# SPDX-License-Identifier: Apache-2.0
"""Losses of a block: write every step to a CSV file and to the Trainer's loggers, under stable names."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import lightning as L
import torch
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.loggers import Logger
from torch import Tensor
from typing_extensions import override

from omniq.calibration.pass_module import PassModule
from omniq.distributed import collectives
from omniq.storage.atomic import open_for_append, report_full_disk

HEADER = b"stage,step,pass,name,value\n"


class BlockLosses(Callback):
    """Write the tracked values of the module once per pass, without host synchronization in between.

    The CSV file has one value per row, with floats that read back exactly. The checkpoint records the length of the
    file. A resumed fit truncates the file to this length and continues, so that no row is lost or duplicated. Loggers
    receive the same values under names such as ``block/007/loss``. With several processes, rank 0 writes the means over
    all processes. The final losses of the block on calibration and held-out samples follow after the fit
    (``log_final``).

    Args:
        path: the CSV file of this block and stage.
        stage: name of the stage, for the first column.
    """

    def __init__(self, path: Path, stage: str) -> None:
        self.path, self.stage = path, stage
        self.length = 0
        self.latest: tuple[str, ...] = ()
        self._first: dict[str, list[float]] = {}
        self._last: dict[str, list[float]] = {}
        self._pending: list[tuple[int, str, Tensor]] = []
        self._loggers: list[Logger] = []
        self._name, self._step, self._pass = "", 0, 0

    @override
    def state_dict(self) -> dict[str, Any]:
        return {"length": self.length, "first": self._first, "last": self._last}

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.length = state_dict["length"]
        self._first, self._last = state_dict["first"], state_dict["last"]

    @property
    def first_pass(self) -> dict[str, float]:
        """The mean of each value over the first pass that tracked it."""
        return {name: total / count for name, (_, total, count) in self._first.items()}

    @property
    def last_pass(self) -> dict[str, float]:
        """The mean of each value over the latest pass that tracked it, over the steps written so far."""
        return {name: total / count for name, (_, total, count) in self._last.items()}

    @property
    def ends(self) -> dict[str, float]:
        """The means of the first and of the latest pass, under names such as ``loss.first`` and ``loss.last``."""
        passes = {"first": self.first_pass, "last": self.last_pass}
        return {f"{name}.{when}": value for when, means in passes.items() for name, value in means.items()}

    def has_rows_of(self, checkpoint: Mapping[str, Any]) -> bool:
        """Return whether the file still has all rows that were written before this checkpoint."""
        length: int = checkpoint["callbacks"][self.state_key]["length"]
        return self.path.exists() and self.path.stat().st_size >= length

    @override
    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        assert isinstance(pl_module, PassModule)
        self._loggers, self._name = trainer.loggers, pl_module.task.name
        if collectives.rank() != 0:
            return
        with open_for_append(self.path) as file:
            file.truncate(self.length)
            if self.length == 0:
                file.write(HEADER)
                self.length = len(HEADER)

    @override
    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        assert isinstance(pl_module, PassModule)
        step = self._step = batch_idx + 1
        self._pass = pl_module.batches.pass_of(step)
        self._pending += [(step, name, value) for name, value in pl_module.tracked]
        pl_module.tracked.clear()
        if pl_module.pausing or step == trainer.num_training_batches:
            self._write(trainer, pl_module)

    def log_final(self, values: Mapping[str, float]) -> None:
        """Write values that are known only after the fit, such as ``held_out_loss``, at the last step.

        NOTE: call this before the block counts as finished. A resumed fit truncates these rows and writes them again.
        """
        with report_full_disk(self.path.parent):
            for logger in self._loggers:
                logger.log_metrics({f"{self._name}/{name}": value for name, value in values.items()}, self._step)
                logger.finalize("success")  # the end of the fit closed the logger
        if collectives.rank() == 0:
            self._append("".join(self._row(self._step, self._pass, *item) for item in values.items()).encode())

    def _write(self, trainer: L.Trainer, module: PassModule[Any]) -> None:
        if not self._pending:
            return
        stacked = torch.stack([value.double().reshape(()) for _, _, value in self._pending]).to(module.task.device)
        values = (collectives.all_reduce_sum(stacked) / collectives.world_size()).tolist()
        rows: list[str] = []
        for (step, name, _), value in zip(self._pending, values, strict=True):
            pass_index = module.batches.pass_of(step)
            rows.append(self._row(step, pass_index, name, value))
            self._count(name, pass_index, value)
            for logger in trainer.loggers:
                logger.log_metrics({f"{module.task.name}/{name}": value}, step)
        self.latest = tuple(dict.fromkeys(name for _, name, _ in self._pending))
        self._pending.clear()
        if collectives.rank() == 0:
            self._append("".join(rows).encode())

    def _count(self, name: str, pass_index: int, value: float) -> None:
        """Add a value to the sums of its pass, ``[pass, sum, count]``, independently of the times of writing."""
        for sums in (self._first, self._last):
            if name not in sums or (sums is self._last and sums[name][0] != pass_index):
                sums[name] = [pass_index, 0.0, 0]
            if sums[name][0] == pass_index:
                sums[name][1] += value
                sums[name][2] += 1

    def _row(self, step: int, pass_index: int, name: str, value: float) -> str:
        return f"{self.stage},{step},{pass_index},{name},{value!r}\n"

    def _append(self, rows: bytes) -> None:
        with open_for_append(self.path) as file:
            file.write(rows)
            self.length = file.tell()
