# SPDX-License-Identifier: Apache-2.0
"""Fold the learned parameters of a stage into the block's result, so that the exported model has no overhead."""

import lightning as L
from lightning.pytorch.callbacks import Callback
from typing_extensions import override

from omniq.calibration.pass_module import PassModule
from omniq.distributed import collectives


class Fuse(Callback):
    """Compute the final result of a stage when the fit has ended.

    If a value is not finite in the export dtype, the result of the stage is replaced by its starting point, and the
    summary of the block records this.

    NOTE: ``on_fit_end``, never ``on_train_end``: a fit that resumes after its last step skips the training hooks.
    """

    @override
    def on_fit_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        assert isinstance(pl_module, PassModule)
        task = pl_module.task
        result, dtype = pl_module.finish(), task.export_dtype
        name = collectives.broadcast_from_rank0(lambda: result.first_unstorable(dtype))
        if name is not None:
            task.notes["guard"] = f"{name} is not finite in {dtype}: kept {pl_module.abandon()}"
            result = pl_module.finish()
        # A broadcast keeps the device of tensors, and would put the tensors of all ranks on one GPU.
        task.result = result.on_host()
