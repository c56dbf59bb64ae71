# SPDX-License-Identifier: Apache-2.0
"""Recover from a non-finite loss: restore the last good pass, reduce the learning rate, and finally give up."""

import copy
from math import inf
from typing import Any

import lightning as L
import torch
from lightning.pytorch.callbacks import Callback
from torch import Tensor
from torch.nn.utils import get_total_norm
from typing_extensions import override

from omniq.calibration.pass_module import PassModule
from omniq.distributed import collectives


class NonFiniteGuard(Callback):
    """Check the losses of each pass and the learned parameters once, at the end of the pass, without stopping the run.

    If a loss or a learned parameter is not finite, the state at the end of the last good pass is restored and the
    learning rates are multiplied by ``factor``. After ``tries`` such passes the stage keeps its initial grid, and the
    summary of the block records this.

    Args:
        tries: number of non-finite passes after which the stage gives up.
        factor: factor on the learning rates after each non-finite pass.
    """

    def __init__(self, tries: int = 3, factor: float = 0.5) -> None:
        self.tries, self.factor = tries, factor
        self.failed = 0
        self.note: str | None = None
        self._losses: list[Tensor] = []
        self._good: dict[str, Any] = {}

    @override
    def state_dict(self) -> dict[str, Any]:
        return {"failed": self.failed, "note": self.note}

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.failed, self.note = state_dict["failed"], state_dict["note"]

    @override
    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        assert isinstance(pl_module, PassModule)
        self._write_note(pl_module)
        self._save_state(trainer, pl_module)

    @override
    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        assert isinstance(pl_module, PassModule)
        self._losses += [value for _, value in pl_module.tracked[-1:]]
        if not pl_module.pausing:
            return
        learned = [value for value in pl_module.state_dict().values() if value.is_floating_point() and value.numel()]
        largest = get_total_norm([*learned, *self._losses], inf)  # a few kernel launches in total; propagates NaN
        self._losses.clear()
        bad = (~largest.isfinite()).to(pl_module.task.device, torch.int64)
        if not collectives.all_reduce_sum(bad):
            self._save_state(trainer, pl_module)
            return
        self._restore_state(trainer, pl_module)

    def _save_state(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        states = {"module": module.state_dict(), "optimizers": [o.state_dict() for o in trainer.optimizers]}
        self._good = copy.deepcopy(states)

    def _restore_state(self, trainer: L.Trainer, module: PassModule[Any]) -> None:
        self.failed += 1
        module.load_state_dict(self._good["module"])
        for optimizer, state in zip(trainer.optimizers, self._good["optimizers"], strict=True):
            # The rates come from the current schedule, not from the saved state.
            rates = [group["lr"] for group in optimizer.param_groups]
            optimizer.load_state_dict(copy.deepcopy(state))
            for group, rate in zip(optimizer.param_groups, rates, strict=True):
                group["lr"] = rate * self.factor
            optimizer.zero_grad()  # the gradients of the bad pass must not accumulate into the next pass
        for config in trainer.lr_scheduler_configs:
            base_lrs = getattr(config.scheduler, "base_lrs", [])
            config.scheduler.base_lrs = [rate * self.factor for rate in base_lrs]
        module.restored()
        self.note = f"non-finite loss in {self.failed} pass(es): learning rate x {self.factor**self.failed:g}"
        if self.failed >= self.tries:
            self.note = f"non-finite loss in {self.failed} passes: kept {module.abandon()}"
            trainer.should_stop = True
        self._write_note(module)
        self._save_state(trainer, module)

    def _write_note(self, module: PassModule[Any]) -> None:
        if self.note is not None:
            module.task.notes["guard"] = self.note
