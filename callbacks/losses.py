# SPDX-License-Identifier: Apache-2.0
"""Per-block losses: every step to a CSV file of the block, and to the Trainer's loggers under stable names."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import lightning as L
import torch
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.loggers import Logger
from torch import Tensor
from typing_extensions import override

from omniq.calibration.module import BlockModule
from omniq.distributed import collectives
from omniq.storage.atomic import appending, others_writing

HEADER = b"stage,step,pass,name,value\n"


class BlockLosses(Callback):
    """Write what the module tracks, once a pass, without a host synchronisation in between.

    The CSV file is long: one value a row, floats written so that they read back exactly. Its length is part of the
    checkpoint: a resumed fit cuts the file there and continues, so that no row is lost or doubled. Loggers get the
    same values as ``block/007/loss``. Of several processes the first writes the means over all. What became of the
    block, calibration and held-out samples apart, follows when it is known (``conclude``).

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
        self._waiting: list[tuple[int, str, Tensor]] = []
        self._loggers: list[Logger] = []
        self._name, self._step, self._turn = "", 0, 0

    @override
    def state_dict(self) -> dict[str, Any]:
        return {"length": self.length, "first": self._first, "last": self._last}

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.length = state_dict["length"]
        self._first, self._last = state_dict["first"], state_dict["last"]

    @property
    def first_pass(self) -> dict[str, float]:
        """Mean of each value over the first pass that had it."""
        return {name: total / count for name, (_, total, count) in self._first.items()}

    @property
    def last_pass(self) -> dict[str, float]:
        """Mean of each value over the latest pass that had it, as far as it was written."""
        return {name: total / count for name, (_, total, count) in self._last.items()}

    def holds(self, checkpoint: Mapping[str, Any]) -> bool:
        """Whether the file still has every row that was written before this checkpoint."""
        length: int = checkpoint["callbacks"][self.state_key]["length"]
        return self.path.exists() and self.path.stat().st_size >= length

    @override
    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        assert isinstance(pl_module, BlockModule)
        self._loggers, self._name = trainer.loggers, pl_module.task.name
        if collectives.rank() != 0:
            return
        with appending(self.path) as file:
            file.truncate(self.length)
            if self.length == 0:
                file.write(HEADER)
                self.length = len(HEADER)

    @override
    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        assert isinstance(pl_module, BlockModule)
        step = self._step = batch_idx + 1
        self._turn = pl_module.batches.pass_of(step)
        self._waiting += [(step, name, value) for name, value in pl_module.tracked]
        pl_module.tracked.clear()
        if pl_module.pausing or step == trainer.num_training_batches:
            self._write(trainer, pl_module)

    def conclude(self, values: Mapping[str, float]) -> None:
        """Add what is known of the block only after the fit, such as ``held_out_loss``, at the step that was its last.

        NOTE: before the block counts as finished: a fit that is resumed cuts these rows off and writes them again.
        """
        with others_writing(self.path.parent):
            for logger in self._loggers:
                logger.log_metrics({f"{self._name}/{name}": value for name, value in values.items()}, self._step)
                logger.finalize("success")  # the end of the fit has closed it
        if collectives.rank() == 0:
            self._append("".join(self._row(self._step, self._turn, *item) for item in values.items()).encode())

    def _write(self, trainer: L.Trainer, module: BlockModule) -> None:
        if not self._waiting:
            return
        stacked = torch.stack([value.double().reshape(()) for _, _, value in self._waiting]).to(module.task.device)
        values = (collectives.all_reduce_sum(stacked) / collectives.world_size()).tolist()
        rows: list[str] = []
        for (step, name, _), value in zip(self._waiting, values, strict=True):
            turn = module.batches.pass_of(step)
            rows.append(self._row(step, turn, name, value))
            self._count(name, turn, value)
            for logger in trainer.loggers:
                logger.log_metrics({f"{module.task.name}/{name}": value}, step)
        self.latest = tuple(dict.fromkeys(name for _, name, _ in self._waiting))
        self._waiting.clear()
        if collectives.rank() == 0:
            self._append("".join(rows).encode())

    def _count(self, name: str, turn: int, value: float) -> None:
        """Add a value to the sums of its pass; each is ``[pass, sum, count]``, whatever is written when."""
        for sums in (self._first, self._last):
            if name not in sums or (sums is self._last and sums[name][0] != turn):
                sums[name] = [turn, 0.0, 0]
            if sums[name][0] == turn:
                sums[name][1] += value
                sums[name][2] += 1

    def _row(self, step: int, turn: int, name: str, value: float) -> str:
        return f"{self.stage},{step},{turn},{name},{value!r}\n"

    def _append(self, rows: bytes) -> None:
        with appending(self.path) as file:
            file.write(rows)
            self.length = file.tell()
