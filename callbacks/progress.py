# SPDX-License-Identifier: Apache-2.0
"""Show the passes of a block's fit on the display of the run."""

from typing import Any

import lightning as L
from lightning.pytorch.callbacks import Callback
from typing_extensions import override

from omniq.calibration.pass_module import PassModule
from omniq.callbacks.losses import BlockLosses
from omniq.report.display import Display


class BlockProgress(Callback):
    """Advance the display by steps, and show the mean losses of the last pass.

    Args:
        display: the display of the run. Lightning's own progress bars cannot be nested in it, because they clear rich's
            live stack.
        stage: name of the stage.
        losses: the callback that records the losses.
    """

    def __init__(self, display: Display, stage: str, losses: BlockLosses) -> None:
        self.display, self.stage, self.losses = display, stage, losses

    @override
    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        assert isinstance(pl_module, PassModule)
        done = pl_module.batches.position
        self.display.stage(pl_module.task.index, self.stage, done, int(trainer.num_training_batches))

    @override
    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        means = self.losses.last_pass
        self.display.step(batch_idx + 1, {name: means[name] for name in self.losses.latest[-3:]})
