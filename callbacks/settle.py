# SPDX-License-Identifier: Apache-2.0
"""Wait for the block before, which is written while this one is prepared, where a kill would otherwise cost too much.

Until a block is on the disk, a kill costs its last pass. A step by gradients on the next block would be lost besides,
so none is made before; and no checkpoint of the next block is saved before, because it stands on the codes of this one.
What comes earlier goes on meanwhile: the full-precision stream through the next block, its searched ranges, and all of
a stage that does without gradients and is done before its first checkpoint.
"""

from collections.abc import Callable
from typing import Any

import lightning as L
from lightning.pytorch.callbacks import Callback
from typing_extensions import override

from omniq.calibration.module import BlockModule


class Settle(Callback):
    """Call something before the first step by gradients, and before every checkpoint.

    Args:
        settle: returns when the block before is written; does nothing when called again.
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
        assert isinstance(pl_module, BlockModule)
        step = batch_idx + 1
        if step < trainer.num_training_batches and pl_module.pausing:
            self.settle()
