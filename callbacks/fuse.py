# SPDX-License-Identifier: Apache-2.0
"""Fold what a stage learned into the block's result, so that the deployed model carries no overhead."""

import lightning as L
from lightning.pytorch.callbacks import Callback
from typing_extensions import override

from omniq.calibration.module import BlockModule
from omniq.distributed import collectives


class Fuse(Callback):
    """Round for the last time when the fit has ended.

    If something of that cannot be stored in the dtype of deployment, the stage is abandoned for its start, and the
    block's summary says so.

    NOTE: ``on_fit_end``, never ``on_train_end``: a fit that is resumed after its last step skips the training hooks.
    """

    @override
    def on_fit_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        assert isinstance(pl_module, BlockModule)
        task = pl_module.task
        result, dtype = pl_module.finish(), task.export_dtype
        name = collectives.broadcast_from_rank0(lambda: result.first_unstorable(dtype))
        if name is not None:
            task.notes["guard"] = f"{name} is not finite in {dtype}: kept {pl_module.abandon()}"
            result = pl_module.finish()
        task.result = result.on_host()  # told to other processes, tensors come to lie where they lay: all on one GPU
