# SPDX-License-Identifier: Apache-2.0
"""Shared by the tests of stages: a tiny block with its two streams, and a fit like that of a run."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import lightning as L
import torch
from lightning.pytorch.callbacks import Callback
from torch import Tensor
from torch.utils._pytree import tree_map_only

from omniq.blocks.forward import call_block
from omniq.calibration.module import BlockModule
from omniq.calibration.stage import Stage
from omniq.calibration.task import BlockTask
from omniq.callbacks.checkpoint import AtomicCheckpointIO, PassCheckpoint
from omniq.callbacks.fuse import Fuse
from omniq.callbacks.guard import NonFiniteGuard
from omniq.callbacks.losses import BlockLosses
from omniq.grid.affine import Grid
from omniq.models.families import family_of_type
from omniq.report.stopwatch import Stopwatch
from tests.helpers import runs
from tests.helpers.tiny import tiny_block

SIZES = {"hidden_size": 32, "num_attention_heads": 2, "intermediate_size": 48, "num_key_value_heads": 1}


def tiny_task(grid: Grid, samples: int = 3, length: int = 12) -> BlockTask:
    """A LLaMA block whose quantized stream is a little off the full-precision one."""
    block, kwargs = tiny_block("llama", length=length, **SIZES)
    generator = torch.Generator().manual_seed(1)
    clean = torch.randn(samples, length, SIZES["hidden_size"], generator=generator)
    noise = torch.randn(clean.shape, generator=generator)
    with torch.no_grad():
        targets = call_block(block, clean, kwargs)
    layout = family_of_type("llama").layout(block, 0)
    grids = dict.fromkeys(layout.linears, grid)
    return BlockTask(0, layout, block, grids, clean + 0.1 * noise, targets, kwargs, seed=5)


def on_cuda(task: BlockTask) -> BlockTask:
    """The same task on a GPU."""
    task.block.cuda()
    kwargs = tree_map_only(Tensor, Tensor.cuda, task.kwargs)
    return replace(task, inputs=task.inputs.cuda(), targets=task.targets.cuda(), kwargs=kwargs)


def fit(module: BlockModule, folder: Path, *more: Callback, resume: bool = False, **trainer: Any) -> BlockModule:
    """One fit without a run directory; its losses and its checkpoint are in ``folder``."""
    folder.mkdir(exist_ok=True)
    last = folder / "last.ckpt"
    kept = [NonFiniteGuard(), BlockLosses(folder / "losses.csv", "stage")]
    quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False, "log_every_n_steps": 1}
    options = {"accelerator": "cpu", "max_epochs": 1, "enable_checkpointing": False, **quiet, **trainer}
    callbacks = [*kept, *more, Fuse(), PassCheckpoint(last, Stopwatch())]
    plugins = [AtomicCheckpointIO(), *options.pop("plugins", [])]
    L.Trainer(callbacks=callbacks, plugins=plugins, **options).fit(
        module, module.batches, ckpt_path=last if resume else None
    )
    return module


def fitted(stage: Stage, task: BlockTask, folder: Path, **trainer: Any) -> BlockModule:
    """A stage's module after its fit."""
    return fit(stage.module(task), folder, **trainer)


class Stop(Callback):
    """Ends the process of a fit after a step, as Ctrl-C would."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        if batch_idx == self.step:
            raise RuntimeError("stopped by the test")


def losses(folder: Path) -> list[float]:
    """The loss of every step of that fit."""
    return runs.losses(folder / "losses.csv")
