# SPDX-License-Identifier: Apache-2.0
"""Wait until the previous block is on the disk, before work starts that a kill would lose.

The previous block is written in the background. Until it is on the disk, a kill loses its last pass. Gradient steps on
the next block would be lost as well, so they wait for the write. Checkpoints of the next block also wait, because they
depend on the codes of the previous block. Other work runs during the write: the full-precision stream through the next
block, its range search, and gradient-free stages that finish before their first checkpoint.
"""

from collections.abc import Callable
from typing import Any

import lightning as L
from lightning.pytorch.callbacks import Callback
from typing_extensions import override

from omniq.calibration.pass_module import PassModule


class Settle(Callback):
    """Wait for the previous block before the first gradient step and before every checkpoint.

    Args:
        settle: returns when the previous block is on the disk, and at once when it is called again.
    """

    def __init__(self, settle: Callable[[], None]) -> None:
        self.settle = settle

    @override
    def on_train_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        if any(value.requires_grad for value in pl_module.parameters()):
            self.settle()

    @override
    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        assert isinstance(pl_module, PassModule)
        step = batch_idx + 1
        if step < trainer.num_training_batches and pl_module.pausing:
            self.settle()
