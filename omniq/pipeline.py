# SPDX-License-Identifier: Apache-2.0
"""The loop over blocks: a checkpoint flows through a line of blocks, at each a few stages find integer codes.

    text ─► tokens ─► embedding ─► for each block: full-precision outputs, stages, codes, quantized outputs ─► export

It goes one way, and it is the same loop whether a run starts or continues: what a finished block left in the run
directory is read instead of computed.
"""

import logging
import time
from pathlib import Path

from torch import Tensor, nn

from omniq.config import Run
from omniq.display import Display
from omniq.files import CorruptFile
from omniq.fit import Fitting, fit_stage
from omniq.preflight import Plan, prepare
from omniq.quantizers.hooks import quantized_activations
from omniq.result import BlockResult, deploy
from omniq.run_dir import RunDir
from omniq.stages.base import BlockTask
from omniq.streams import Streams, propagate
from omniq.wrap_up import wrap_up

log = logging.getLogger("omniq")


def quantize(run: Run, settings: str) -> Path:
    """Quantize a model: the main job.

    Args:
        run: what to do.
        settings: the resolved configuration as YAML, recorded with the run.

    Returns:
        The run directory.

    Raises:
        UserError: something cannot be done as asked; found before the first block wherever possible.
    """
    plan = prepare(run, settings)
    with RunDir(run.out) as folder:
        resumed = folder.claim(plan.fingerprint, settings)
        folder.write_json("environment.json", plan.environment)
        with Display(plan.source.num_blocks) as display:
            if resumed:
                display.console.print(f"continuing the run in {run.out}")
            calibrate(plan, folder, display)
        wrap_up(plan, folder, display.console)
    return run.out


def calibrate(plan: Plan, folder: RunDir, display: Display) -> None:
    """Finish every block that is not finished yet."""
    blocks = plan.source.num_blocks
    finished = [folder.load_block(index) is not None for index in range(blocks)]
    if all(finished):
        for index in range(blocks):
            _show(display, index, folder.load_block(index))
        return
    streams = _streams_before(plan, folder, finished.index(False))
    for index in range(streams.index, blocks):
        started = time.perf_counter()
        block = plan.source.block(index, plan.device)
        kwargs = plan.block_arguments[index]
        propagate(block, streams.full_precision, kwargs, plan.precision, plan.run.batch)
        result = folder.load_block(index)
        if result is None:
            result = run_stages(plan, folder, display, index, block, streams)
        deploy(block, result)
        with quantized_activations(block, plan.source.family, plan.run.scheme.activations):
            propagate(block, streams.quantized, kwargs, plan.precision, plan.run.batch)
        if not folder.block_path(index).exists():
            folder.save_block(index, summarize(result, streams, plan.held_out, time.perf_counter() - started))
        streams.index = index + 1
        if plan.run.save_streams_every and streams.index % plan.run.save_streams_every == 0:
            folder.save_streams(streams)
        _show(display, index, folder.load_block(index))


def run_stages(
    plan: Plan, folder: RunDir, display: Display, index: int, block: nn.Module, streams: Streams
) -> BlockResult:
    """Send one block through all stages; a stage that finished before an interruption is not repeated."""
    samples = len(streams.quantized) - plan.held_out
    task = BlockTask(
        index=index,
        family=plan.source.family,
        block=block,
        grid=plan.run.scheme.grid,
        inputs=streams.quantized[:samples],
        targets=streams.full_precision[:samples],
        kwargs=plan.block_arguments[index],
        seed=plan.run.seed,
        precision=plan.precision,
        activations=plan.run.scheme.activations,
    )
    for number, stage in enumerate(plan.run.stages):
        fit_stage(task, stage, Fitting(plan.run, folder, display, number))
    if task.result is None:
        raise RuntimeError(f"block {index}: the stages left no result")
    return task.result.with_summary(**task.notes)


def summarize(result: BlockResult, streams: Streams, held_out: int, seconds: float) -> BlockResult:
    """Add what became of the block: its reconstruction error as deployed, relative to the output's power."""
    errors = {}
    samples = len(streams.quantized) - held_out
    for name, part in (("loss", slice(0, samples)), ("held_out_loss", slice(samples, None))):
        if len(streams.quantized[part]):
            error, power = _mean_squares(streams.quantized[part], streams.full_precision[part])
            errors |= {name: error, f"relative_{name}": error / power}
    return result.with_summary(**errors, seconds=round(seconds, 3))


def _mean_squares(quantized: Tensor, full_precision: Tensor) -> tuple[float, float]:
    """Mean squared difference and mean square of the target, summed in float64 sample by sample."""
    error = power = 0.0
    for ours, theirs in zip(quantized, full_precision, strict=True):
        error += (ours.double() - theirs.double()).square().sum().item()
        power += theirs.double().square().sum().item()
    return error / quantized.numel(), power / quantized.numel()


def _streams_before(plan: Plan, folder: RunDir, first: int) -> Streams:
    """Streams at or before the first unfinished block: as saved, or from the embedding."""
    saved = folder.load_streams()
    if saved is not None and saved.index <= first:
        saved.full_precision = saved.full_precision.to(plan.stream_device)
        saved.quantized = saved.quantized.to(plan.stream_device)
        return saved
    return Streams.start(plan.embed())


def _show(display: Display, index: int, result: BlockResult | None) -> None:
    if result is None:
        raise CorruptFile(f"block {index} was just written and cannot be read back")
    parts = [f"{name} {result.summary[name]:.4g}" for name in ("loss", "held_out_loss") if name in result.summary]
    parts += [str(result.summary[name]) for name in ("guard",) if name in result.summary]
    display.block(index, "  ".join([*parts, f"{result.summary['seconds']:.1f} s"]))
