# SPDX-License-Identifier: Apache-2.0
"""Run a stage of the whole model after the last block.

The fit resumes at the end of every pass, as that of a block does. Its result is one file for each block with the
tensors that changed, and then an entry in ``model_stages.json``, which marks the stage as finished.
"""

import logging
from typing import Any

from torch import Tensor

from omniq.blocks.forward import propagate
from omniq.blocks.grids import scheme_layout
from omniq.blocks.prefetch import blocks_ahead
from omniq.blocks.streams import Streams
from omniq.calibration.model_task import ModelResult, ModelTask
from omniq.calibration.tunable_block import TunableBlock
from omniq.distributed import collectives
from omniq.errors import CorruptFile
from omniq.report.display import Display
from omniq.report.stopwatch import Stopwatch
from omniq.report.table import model_line
from omniq.run.fit import FitContext, fit
from omniq.run.plan import Plan
from omniq.storage.ownership import MODEL_STAGES
from omniq.storage.records import without_non_finite
from omniq.storage.run_dir import RunDir

log = logging.getLogger("omniq")


def fit_model_stage(plan: Plan, folder: RunDir, display: Display, number: int, streams: Streams | None) -> None:
    """Run one stage on the finished blocks, unless it is finished.

    Args:
        plan: the run.
        folder: the run directory.
        display: the progress display.
        number: position of the stage in the list.
        streams: the streams after the last block; None to compute that of the full-precision model again.
    """
    stage, name = plan.run.model_stages[number], type(plan.run.model_stages[number]).__name__
    if collectives.broadcast_from_rank0(lambda: is_finished(plan, folder, number)):
        display.console.print(f"model  {name} is finished", highlight=False)
        return
    clock = Stopwatch()
    task = model_task(plan, folder, number, targets_of(plan, streams))
    losses = fit(stage.module(task), name, FitContext(plan.run, folder, display, number, clock))
    result = collectives.broadcast_from_rank0(lambda: task.result)
    assert result is not None  # the callback Fuse sets it
    notes = without_non_finite({"stage": name, **losses.ends, **task.notes, "seconds": round(clock.seconds, 3)})
    collectives.broadcast_from_rank0(lambda: save(plan, folder, task, number, result, notes))
    display.console.print(model_line(notes), highlight=False)


def model_task(plan: Plan, folder: RunDir, number: int, targets: Tensor) -> ModelTask:
    """Collect the finished blocks, with the changes of earlier stages of the model, and the streams of a run."""
    earlier = [each for each in plan.run.model_stages if each < number]
    source, scheme, device = plan.source, plan.run.scheme, plan.device
    return ModelTask(
        block=lambda index: source.block(index, device),
        read=lambda index: folder.final_block(index, earlier),
        layouts=[scheme_layout(source, scheme, index) for index in range(source.num_blocks)],
        inputs=plan.embed(),
        targets=targets,
        held_out=plan.held_out,
        kwargs=plan.block_arguments,
        head=lambda hidden: source.logits(hidden, device),
        vocabulary=source.config.get_text_config().vocab_size,
        device=device,
        export_dtype=scheme.export_dtype,
        placement=plan.placement,
        seed=plan.run.seed,
        precision=plan.precision,
        activations=scheme.activations,
    )


def targets_of(plan: Plan, streams: Streams | None) -> Tensor:
    """Return the output of the last block in the full-precision model, ``[n, t, h]``."""
    if streams is not None and streams.index == plan.source.num_blocks:
        return streams.full_precision
    hidden = plan.embed()
    for index, block in blocks_ahead(plan.source, 0, plan.device):
        propagate(block, hidden, plan.block_arguments[index], plan.precision, plan.run.batch)
        del block
    return hidden


def save(plan: Plan, folder: RunDir, task: ModelTask, number: int, result: ModelResult, notes: dict[str, Any]) -> None:
    """Write the changed tensors of every block, then the entry that marks the stage as finished."""
    stages = [each for each in plan.run.model_stages if each <= number]
    for index, changes in enumerate(result.changes):
        before = task.read(index)
        learned = any(key.endswith(":codes") for key in changes)
        block = TunableBlock(task.block(index), before, learned, task.export_dtype)
        after = block.changed(before, {key: value.to(plan.device) for key, value in changes.items()})
        folder.save_changes(index, stages, after.changed_from(before))
    record = folder.load_record(MODEL_STAGES) or {}
    folder.save_record(MODEL_STAGES, {**record, str(number): notes})
    folder.current(None, number, "last.ckpt").unlink(missing_ok=True)


def is_finished(plan: Plan, folder: RunDir, number: int) -> bool:
    """Return whether a stage is finished and its files are intact and belong to the codes of the blocks."""
    record = folder.load_record(MODEL_STAGES) or {}
    if str(number) not in record:
        return False
    stages = [each for each in plan.run.model_stages if each <= number]
    try:
        for index in range(plan.source.num_blocks):
            folder.final_block(index, stages)
    except CorruptFile as error:
        log.warning("%s; %s of the whole model runs again", error, type(plan.run.model_stages[number]).__name__)
        # Otherwise, a kill while the files are written again would leave files of two fits that look finished.
        folder.save_record(MODEL_STAGES, {key: notes for key, notes in record.items() if int(key) < number})
        return False
    return True
