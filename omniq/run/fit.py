# SPDX-License-Identifier: Apache-2.0
"""Run ``Trainer.fit`` for one stage of one block. The fit can resume at the end of every pass.

A stage before the last saves its result and its transformed block in the run directory, so that a run interrupted in a
later stage does not repeat it.
"""

from dataclasses import dataclass
from importlib.util import find_spec
from math import isfinite
from pathlib import Path
from typing import Any

import lightning as L
import torch
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.loggers import TensorBoardLogger

from omniq.blocks.weights import block_tensors, set_tensors
from omniq.calibration.pass_module import PassModule, Task
from omniq.calibration.stage import Stage
from omniq.calibration.task import BlockTask
from omniq.callbacks.checkpoint import AtomicCheckpointIO, PassCheckpoint
from omniq.callbacks.fuse import Fuse
from omniq.callbacks.guard import NonFiniteGuard
from omniq.callbacks.losses import BlockLosses
from omniq.callbacks.progress import BlockProgress
from omniq.callbacks.settle import Settle
from omniq.config.run import Run
from omniq.config.trainer import trainer_arguments
from omniq.distributed import collectives
from omniq.distributed.launch import launch_arguments
from omniq.errors import CorruptFile, UserError
from omniq.report.display import Display
from omniq.report.stopwatch import Stopwatch
from omniq.storage.atomic import report_full_disk
from omniq.storage.block_result import BlockResult
from omniq.storage.records import task_name
from omniq.storage.run_dir import RunDir


@dataclass(frozen=True)
class FitContext:
    """The surroundings of one fit.

    Args:
        run: the configuration.
        folder: the run directory.
        display: the progress display of the run.
        number: position of the stage in the list.
        clock: the stopwatch of the block.
    """

    run: Run
    folder: RunDir
    display: Display
    number: int
    clock: Stopwatch


def fit_stage(task: BlockTask, stage: Stage, context: FitContext) -> BlockLosses | None:
    """Run one stage on one block. The result is stored in ``task.result``, notes in ``task.notes``.

    Returns:
        The callback that wrote the losses; None if the stage finished in an earlier process.
    """
    if _load_stage(task, context):
        return None
    name = type(stage).__name__
    losses = fit(stage.module(task), name, context)
    # All processes continue with the same codes, even if their hardware rounds differently.
    task.result = collectives.broadcast_from_rank0(lambda: task.result)
    names = [type(each).__name__ for each in context.run.stages]
    label = name if names.count(name) == 1 else f"{name} {context.number + 1}"
    task.notes |= {f"{label}.{name}": value for name, value in losses.ends.items()}
    if context.number + 1 < len(context.run.block_stages):
        _save_stage(task, context)
    return losses


def fit(module: PassModule[Any], name: str, context: FitContext) -> BlockLosses:
    """Run ``Trainer.fit`` for one stage on one task, from its last checkpoint if there is one.

    Args:
        module: the stage at work.
        name: name of the stage.
        context: the surroundings of the fit.

    Returns:
        The callback that wrote the losses.
    """
    task, folder = module.task, context.folder
    losses = BlockLosses(folder.block_path(task.index, f"{context.number}.csv"), name)
    last = last_checkpoint(context, task)
    given = [make() for make in context.run.callbacks]
    guards = [callback for callback in given if isinstance(callback, NonFiniteGuard)]
    callbacks = [
        *(guards or [NonFiniteGuard()]),
        losses,
        BlockProgress(context.display, name, losses),
        *[callback for callback in given if callback not in guards],
        Fuse(),
        Settle(folder.settle),
        checkpoint := PassCheckpoint(last, context.clock),
    ]
    resume = last if collectives.all_ranks(_resumable(module, checkpoint, losses, folder)) else None
    trainer = make_trainer(context, task, callbacks)
    try:
        with report_full_disk(folder.path):
            trainer.fit(module, module.batches, ckpt_path=resume)
    except SystemExit as error:  # Lightning converts Ctrl-C to SystemExit
        raise KeyboardInterrupt from error
    return losses


def _resumable(module: PassModule[Any], saved: PassCheckpoint, losses: BlockLosses, folder: RunDir) -> bool:
    """True if an intact checkpoint by the same number of processes exists, with all losses that it counts."""
    checkpoint = folder.load_current(saved.path)
    if checkpoint is None:
        return False
    if not saved.has_same_processes(checkpoint):
        folder.discard_current(saved.path, CorruptFile(f"{saved.path} was saved by a different number of processes"))
        return False
    if not module.can_resume(checkpoint):
        folder.discard_current(
            saved.path, CorruptFile(f"{saved.path} was saved for other groups of linears, or in another memory mode")
        )
        return False
    if not losses.has_rows_of(checkpoint):
        folder.discard_current(saved.path, CorruptFile(f"{losses.path} lacks losses that {saved.path} counts"))
        return False
    return True


def check_finite_result(index: int, result: BlockResult, dtype: torch.dtype) -> None:
    """Refuse a block with values that are not finite, before it counts as finished.

    Raises:
        UserError: names the block and the parameter, or says that the loss is not finite.
    """
    if (name := result.first_unstorable(dtype)) is not None:
        raise UserError(f"block {index}: {name} is not finite in {dtype}: set scheme.dtype to bfloat16 or float32")
    if not all(isfinite(result.summary.get(key, 0.0)) for key in ("loss", "held_out_loss")):
        raise UserError(
            f"block {index}: its output is not finite: give another trainer.precision, such as bf16-mixed or "
            "32-true, or remove the transform"
        )


def make_trainer(context: FitContext, task: Task, callbacks: list[Callback]) -> L.Trainer:
    """Make a Trainer with one epoch, omniq's checkpoints, and the user's arguments for everything else."""
    given = trainer_arguments(context.run.trainer)
    arguments: dict[str, Any] = {
        "max_epochs": 1,
        "callbacks": callbacks,
        "plugins": [AtomicCheckpointIO(context.folder.owner(last_checkpoint(context, task)))],
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "default_root_dir": context.folder.path,
        "log_every_n_steps": given.get("log_every_n_steps") or 1,  # otherwise Lightning warns about short epochs
    }
    if given.get("logger") is None:
        arguments["logger"] = _tensorboard(context, task) if find_spec("tensorboard") else False
    trainer = context.run.trainer(**launch_arguments(given), **arguments)
    if trainer.world_size != collectives.world_size():
        raise RuntimeError(f"a fit of {trainer.world_size} processes in a run of {collectives.world_size()}")
    return trainer


def last_checkpoint(context: FitContext, task: Task) -> Path:
    """Return the path of the checkpoint of the fit in progress."""
    return context.folder.current(task.index, context.number, "last.ckpt")


def _tensorboard(context: FitContext, task: Task) -> TensorBoardLogger:
    version = f"{task_name(task.index)}.{context.number}"
    return TensorBoardLogger(context.folder.path, name="tensorboard", version=version)


def _paths(task: BlockTask, context: FitContext) -> tuple[Path, Path]:
    """Return the paths of a finished stage's result and of its block. The block is written last and marks the end."""
    return (
        context.folder.current(task.index, context.number, "result.safetensors"),
        context.folder.current(task.index, context.number, "block"),
    )


def _save_stage(task: BlockTask, context: FitContext) -> None:
    """Save a finished stage: its codes as a block result, the transformed block and the notes as state."""
    result, block = _paths(task, context)
    if task.result is not None:
        context.folder.save_current_result(result, task.result)
        tensors = {name: value.cpu() for name, value in block_tensors(task.block).items()}
        context.folder.save_current(block, {"block": tensors, "notes": task.notes, "seconds": context.clock.seconds})


def _load_stage(task: BlockTask, context: FitContext) -> bool:
    """Load a stage that finished before an interruption; return whether its files are intact."""
    result, block = _paths(task, context)
    state = context.folder.load_current(block)
    finished = context.folder.load_result(result) if state is not None else None
    if not collectives.all_ranks(finished is not None) or state is None:
        return False
    task.result = finished
    set_tensors(task.block, state["block"])
    task.notes = dict(state["notes"])
    context.clock.continue_from(state.get("seconds", 0.0))  # runs of earlier versions lack this key
    return True
