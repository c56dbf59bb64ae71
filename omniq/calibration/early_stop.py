# SPDX-License-Identifier: Apache-2.0
"""Early stopping of a reconstruction: keep the state with the lowest loss on samples that the fit does not learn from.

The last samples of a process are kept from learning. Their mean loss is measured before the first step and after each
pass, with the loss that the fit minimizes, and the sum runs over all processes. The fit stops after ``patience`` passes
without a lower loss, and the stage continues from the state with the lowest loss, which may be its start.

The lowest loss and its state are part of the checkpoint. A fit without kept samples is the plain reconstruction.
"""

from typing import Any

import torch
from torch import Tensor

from omniq.blocks.placement import gather_samples
from omniq.calibration.loader import PassLoader
from omniq.calibration.reconstruction import ReconstructionModule
from omniq.calibration.settings import Reconstruction
from omniq.calibration.task import BlockTask
from omniq.distributed import collectives


class EarlyStopModule(ReconstructionModule):
    """Learns the quantization of one block, with early stopping.

    Args:
        task: the block, its streams and its grids.
        settings: the settings of the stage.
        kept: number of the last samples of this process that are kept from learning; 0 disables early stopping.
        patience: number of passes without a lower loss after which the fit stops.
    """

    def __init__(self, task: BlockTask, settings: Reconstruction, kept: int, patience: int) -> None:
        super().__init__(task, settings)
        self.kept, self.patience = kept, patience
        self.best: dict[str, Any] = {}  # loss, number of passes since then, and learned state

    def loader(self) -> PassLoader:
        loader = super().loader()
        loader.samples -= self.kept
        return loader

    def training_step(self, indices: Tensor) -> None:
        if self.kept and not self.best:
            self._judge()
        super().training_step(indices)
        if self.kept and self.pausing:
            value = self._judge()
            self.tracked.insert(0, ("held_out_loss", value))  # before the loss: the guard checks the last value
            self.trainer.should_stop |= self.best["stale"] >= self.patience

    @torch.no_grad()
    def held_out_loss(self) -> Tensor:
        """Mean loss on the kept samples of all processes, a float64 scalar on the device."""
        total = torch.zeros((), dtype=torch.float64, device=self.task.device)
        first = len(self.task.inputs) - self.kept
        for part in torch.arange(first, len(self.task.inputs)).split(self.settings.batch_size):
            inputs, targets = (gather_samples(x, part, self.task.device) for x in (self.task.inputs, self.targets))
            total += self.loss(inputs, targets).double() * len(part)
            if self.gap is not None:
                total += self.gap[part.to(self.gap.device)].sum().to(total)
        return collectives.all_reduce_sum(total) / (self.kept * collectives.world_size())

    def learned_state(self) -> dict[str, Tensor]:
        """A copy of the learned parameters, by name."""
        return {name: value.detach().clone() for name, value in self.named_parameters()}

    def restore_best(self) -> None:
        """Return to the state with the lowest loss on the kept samples, if there is one."""
        if self.best:
            self.load_state_dict(self.best["state"])

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        if self.kept:
            checkpoint["best"] = self.best

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        self.best = checkpoint.get("best", {})

    def _judge(self) -> Tensor:
        """Measure the loss on the kept samples, and keep the state if the loss is the lowest."""
        value = self.held_out_loss()
        if not self.best or float(value) < self.best["loss"]:  # NaN is not lower
            self.best = {"loss": float(value), "stale": 0, "state": self.learned_state()}
        else:
            self.best["stale"] += 1
        return value
