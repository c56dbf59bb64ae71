# SPDX-License-Identifier: Apache-2.0
"""One ``Trainer.fit`` for one stage of one block, resumable at the end of every pass.

A stage before the last leaves its result, and the block it transformed, in the run directory, so that an interrupted
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

from omniq.blocks.weights import set_tensors
from omniq.calibration.module import BlockModule
from omniq.calibration.stage import Stage
from omniq.calibration.task import BlockTask
from omniq.callbacks import AtomicCheckpointIO, BlockLosses, BlockProgress, Fuse, NonFiniteGuard, PassCheckpoint, Settle
from omniq.config.run import Run
from omniq.config.trainer import trainer_arguments
from omniq.distributed import collectives
from omniq.distributed.launch import launch_arguments
from omniq.errors import CorruptFile, UserError
from omniq.report.display import Display
from omniq.report.stopwatch import Stopwatch
from omniq.storage.atomic import others_writing
from omniq.storage.block_result import BlockResult
from omniq.storage.run_dir import RunDir


@dataclass(frozen=True)
class Fitting:
    """Where a fit happens.

    Args:
        run: the configuration.
        folder: the run directory.
        display: of the run.
        number: position of the stage in the list.
        clock: of the block.
    """

    run: Run
    folder: RunDir
    display: Display
    number: int
    clock: Stopwatch


def fit_stage(task: BlockTask, stage: Stage, where: Fitting) -> BlockLosses | None:
    """Run one stage on one block; its result is then ``task.result``, its notes are in ``task.notes``.

    Returns:
        The losses it has written; None if the stage had finished before.
    """
    if _restore(task, where):
        return None
    name = type(stage).__name__
    module = stage.module(task)
    losses = BlockLosses(where.folder.block_path(task.index, f"{where.number}.csv"), name)
    last = last_checkpoint(where, task)
    given = [make() for make in where.run.callbacks]
    guards = [callback for callback in given if isinstance(callback, NonFiniteGuard)]
    callbacks = [
        *(guards or [NonFiniteGuard()]),
        losses,
        BlockProgress(where.display, name, losses),
        *[callback for callback in given if callback not in guards],
        Fuse(),
        Settle(where.folder.settle),
        checkpoint := PassCheckpoint(last, where.clock),
    ]
    resume = last if collectives.all_ranks(_resumable(module, checkpoint, losses, where.folder)) else None
    trainer = make_trainer(where, task, callbacks)
    try:
        with others_writing(where.folder.path):
            trainer.fit(module, module.batches, ckpt_path=resume)
    except SystemExit as error:  # what Lightning makes of Ctrl-C
        raise KeyboardInterrupt from error
    task.result = collectives.broadcast_from_rank0(
        lambda: task.result
    )  # the same codes everywhere, whatever the hardware
    names = [type(each).__name__ for each in where.run.stages]
    label = name if names.count(name) == 1 else f"{name} {where.number + 1}"
    task.notes |= {f"{label}.{key}.{when}": v for when in ("first", "last") for key, v in _pass(losses, when).items()}
    if where.number + 1 < len(where.run.stages):
        _keep(task, where)
    return losses


def _resumable(module: BlockModule, saved: PassCheckpoint, losses: BlockLosses, folder: RunDir) -> bool:
    """Whether there is a whole checkpoint of this fit by as many processes, and all the losses that belong to it."""
    checkpoint = folder.load_current(saved.path)
    if checkpoint is None:
        return False
    if not saved.shared_alike(checkpoint):
        folder.discard_current(saved.path, CorruptFile(f"{saved.path} was saved by another number of processes"))
        return False
    if not module.can_resume(checkpoint):
        folder.discard_current(saved.path, CorruptFile(f"{saved.path} was saved for other groups of linears"))
        return False
    if not losses.holds(checkpoint):
        folder.discard_current(saved.path, CorruptFile(f"{losses.path} lacks losses that {saved.path} counts"))
        return False
    return True


def check_deployable(index: int, result: BlockResult, dtype: torch.dtype) -> None:
    """Refuse a block that is not fit for deployment, before it counts as finished.

    Raises:
        UserError: names the block, and what is not finite in it.
    """
    if (name := result.first_unstorable(dtype)) is not None:
        raise UserError(f"block {index}: {name} is not finite in {dtype}: set scheme.dtype to bfloat16 or float32")
    if not all(isfinite(result.summary.get(key, 0.0)) for key in ("loss", "held_out_loss")):
        raise UserError(
            f"block {index}: what it computes is not finite: give another trainer.precision, such as bf16-mixed or "
            "32-true, or leave the transform out"
        )


def make_trainer(where: Fitting, task: BlockTask, callbacks: list[Callback]) -> L.Trainer:
    """A fresh Trainer: one epoch, our checkpoints, the user's arguments for everything else."""
    given = trainer_arguments(where.run.trainer)
    arguments: dict[str, Any] = {
        "max_epochs": 1,
        "callbacks": callbacks,
        "plugins": [AtomicCheckpointIO(where.folder.owner(last_checkpoint(where, task)))],
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "default_root_dir": where.folder.path,
        "log_every_n_steps": given.get("log_every_n_steps") or 1,  # or Lightning advises on short epochs
    }
    if given.get("logger") is None:
        arguments["logger"] = _tensorboard(where, task) if find_spec("tensorboard") else False
    trainer = where.run.trainer(**launch_arguments(given), **arguments)
    if trainer.world_size != collectives.world_size():
        raise RuntimeError(f"a fit of {trainer.world_size} processes in a run of {collectives.world_size()}")
    return trainer


def last_checkpoint(where: Fitting, task: BlockTask) -> Path:
    """The checkpoint of the fit in progress."""
    return where.folder.current(task.index, where.number, "last.ckpt")


def _tensorboard(where: Fitting, task: BlockTask) -> TensorBoardLogger:
    version = f"{task.index:03d}.{where.number}"
    return TensorBoardLogger(where.folder.path, name="tensorboard", version=version)


def _pass(losses: BlockLosses, when: str) -> dict[str, float]:
    return losses.first_pass if when == "first" else losses.last_pass


def _paths(task: BlockTask, where: Fitting) -> tuple[Path, Path]:
    """The result of a finished stage, and the block it leaves for the next one (written last: its presence counts)."""
    return (
        where.folder.current(task.index, where.number, "result.safetensors"),
        where.folder.current(task.index, where.number, "block"),
    )


def _keep(task: BlockTask, where: Fitting) -> None:
    """Write a finished stage: its codes as a block result, the transformed block and the notes as state."""
    result, block = _paths(task, where)
    if task.result is not None:
        where.folder.save_current_result(result, task.result)
        tensors = {name: value.detach().cpu() for name, value in task.block.named_parameters()}
        where.folder.save_current(block, {"block": tensors, "notes": task.notes, "seconds": where.clock.seconds})


def _restore(task: BlockTask, where: Fitting) -> bool:
    """Take up a stage that finished before an interruption, if its files are whole."""
    result, block = _paths(task, where)
    state = where.folder.load_current(block)
    finished = where.folder.load_result(result) if state is not None else None
    if not collectives.all_ranks(finished is not None) or state is None:
        return False
    task.result = finished
    set_tensors(task.block, state["block"])
    task.notes = dict(state["notes"])
    where.clock.go_on_from(state.get("seconds", 0.0))  # runs of earlier versions have no key
    return True
