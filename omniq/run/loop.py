# SPDX-License-Identifier: Apache-2.0
"""The loop over blocks: it reads the blocks of a checkpoint in order, and the stages find the codes of each block.

    text ─► tokens ─► embedding ─► for each block: full-precision outputs, stages, codes, quantized outputs ─► export

The loop never goes back. A run that starts and a run that continues use the same loop: the result of a finished block
is read from the run directory instead of computed.
"""

import logging
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor, nn

from omniq.blocks.activation_hooks import quantized_activations
from omniq.blocks.forward import propagate
from omniq.blocks.grids import scheme_grids, scheme_layout
from omniq.blocks.prefetch import blocks_ahead
from omniq.blocks.streams import Streams
from omniq.blocks.weights import block_tensors, load_quantized_weights
from omniq.calibration.static_ranges import calibrate_static_ranges
from omniq.calibration.task import BlockTask
from omniq.callbacks.losses import BlockLosses
from omniq.config.run import Run
from omniq.distributed import collectives
from omniq.kernels.matmul_precision import matmul_precision
from omniq.report.console import plain_console
from omniq.report.display import Display
from omniq.report.stopwatch import Stopwatch
from omniq.run.checks import check_storable
from omniq.run.companions import check_companions
from omniq.run.export_dtype import check_export_dtype
from omniq.run.finish import finish
from omniq.run.fit import FitContext, check_finite_result, fit_stage
from omniq.run.fit_model import fit_model_stage
from omniq.run.generated import save_generated
from omniq.run.plan import Plan, prepare
from omniq.storage.block_result import BlockResult
from omniq.storage.run_dir import RunDir

log = logging.getLogger("omniq")


def quantize(run: Run, settings: str) -> Path:
    """Quantize a model and write its checkpoint.

    Args:
        run: the configuration.
        settings: the resolved configuration as YAML, for the record of the run.

    Returns:
        The run directory.

    Raises:
        UserError: the run is not possible. Most causes are found before the first block.
    """
    plan = prepare(run, settings)
    precision: Literal["float32", "tf32", "bf16"] = "float32" if run.matmul == "ieee" else run.matmul
    with RunDir(run.out) as folder, matmul_precision(precision, plan.device):
        resumed = folder.claim(plan.fingerprint, settings)
        if plan.generated is not None:
            save_generated(folder, plan.generated)
        folder.write_json("environment.json", plan.environment)
        check_companions(folder, plan.source)
        with Display(plan.source.num_blocks, plain_console(quiet=not folder.writes)) as display:
            if resumed:
                display.console.print(f"continuing the run in {run.out}")
            streams = calibrate(plan, folder, display)
            for number in run.model_stages:
                fit_model_stage(plan, folder, display, number, streams)
            del streams
        collectives.finish_on_rank0(lambda: finish(plan, folder, display.console))
    return run.out


def calibrate(plan: Plan, folder: RunDir, display: Display) -> Streams | None:
    """Finish every block that is not finished yet.

    Returns:
        The streams after the last block; None if all blocks were finished before.
    """
    blocks = range(plan.source.num_blocks)
    finished = collectives.broadcast_from_rank0(lambda: [folder.load_block(index) is not None for index in blocks])
    if all(finished):
        for index in blocks:
            _show(display, index, folder.read_block(index))
        return None
    folder.clear_current(keep=finished.index(False))
    streams = _streams_before(plan, folder, finished.index(False))
    plan.source.release()
    for index, block in blocks_ahead(plan.source, streams.index, plan.device):
        result = folder.read_block(index) if finished[index] else None
        _show(display, index, pass_block(plan, folder, display, block, streams, result))
        del block, result  # NOTE: otherwise three blocks are in memory while the next one is read
        _keep_streams(plan, folder, streams)
    folder.flush()
    return streams


def pass_block(
    plan: Plan, folder: RunDir, display: Display, block: nn.Module, streams: Streams, result: BlockResult | None
) -> BlockResult:
    """Send both streams through one block. Calibrate the block in between, unless it is finished."""
    index, kwargs, clock = streams.index, plan.block_arguments[streams.index], Stopwatch()
    finished, losses = result is not None, None
    finite = propagate(block, streams.full_precision, kwargs, plan.precision, plan.run.batch)
    check_finite_outputs(finite, plan.source.block_name(index))
    layout = scheme_layout(plan.source, plan.run.scheme, index)
    if result is None and layout.linears and (plan.run.blocks is None or index < plan.run.blocks):
        result, losses = run_stages(plan, folder, display, block, streams, clock)
    elif result is None:
        result = BlockResult({}, {name: value.cpu() for name, value in block_tensors(block).items()})
    load_quantized_weights(block, result)
    if not finished:
        name = plan.source.block_name(index)
        check_export_dtype(name, block, layout, result, plan.run.scheme, streams.quantized, kwargs)
    with quantized_activations(block, layout, plan.run.scheme.activations, result.linears):
        propagate(block, streams.quantized, kwargs, plan.precision, plan.run.batch)
    streams.index += 1
    folder.flush()  # at most one block and one copy of the streams wait for the disk
    if not finished:
        result = summarize(result, streams, plan.held_out, plan.device, clock.seconds)
        collectives.broadcast_from_rank0(lambda: check_finite_result(index, result, plan.run.scheme.export_dtype))
        collectives.broadcast_from_rank0(lambda: check_storable(plan.run, name, result))
        if losses is not None:
            ends = {"deployed_loss": "loss", "held_out_loss": "held_out_loss"}
            losses.log_final({name: result.summary[key] for name, key in ends.items() if key in result.summary})
        folder.save_block_async(index, result)
    return result


def check_finite_outputs(finite: bool, block: str) -> None:
    """Refuse a full-precision model that computes NaN or infinity, before anything is calibrated on its outputs.

    Args:
        finite: whether all outputs of the full-precision block on this process are finite.
        block: full name of the block.

    Raises:
        UserError: names the block.
    """
    if not collectives.all_ranks(finite):
        raise collectives.error_on_rank0(
            f"{block}: the output of the full-precision model is NaN or infinite: download its weights again, or set "
            "trainer.precision to 32-true"
        )


def run_stages(
    plan: Plan, folder: RunDir, display: Display, block: nn.Module, streams: Streams, clock: Stopwatch
) -> tuple[BlockResult, BlockLosses | None]:
    """Send one block through all stages. A stage that finished before an interruption is not repeated.

    Returns:
        The block's result, and the callback with the losses of its last stage.
    """
    index, samples = streams.index, len(streams.quantized) - plan.held_out
    task = BlockTask(
        index=index,
        layout=scheme_layout(plan.source, plan.run.scheme, index),
        block=block,
        grids=scheme_grids(plan.source, plan.run.scheme, index),
        inputs=streams.quantized[:samples],
        targets=streams.full_precision[:samples],
        kwargs=plan.block_arguments[index],
        seed=plan.run.seed,
        precision=plan.precision,
        activations=plan.run.scheme.activations,
        compile=plan.run.compile,
        result=None if plan.origin is None else plan.origin.read(index),
    )
    losses = None
    for number, stage in enumerate(plan.run.block_stages):
        losses = fit_stage(task, stage, FitContext(plan.run, folder, display, number, clock))
    if task.result is None:
        raise RuntimeError(f"block {index}: the stages left no result")
    result = task.result.with_summary(**task.notes)
    return (calibrate_static_ranges(task, result) if task.activations.static else result), losses


def summarize(
    result: BlockResult, streams: Streams, held_out: int, device: torch.device, seconds: float
) -> BlockResult:
    """Add the final reconstruction errors of the block, absolute and relative to the mean square of the output."""
    errors: dict[str, float] = {}
    samples = len(streams.quantized) - held_out
    for name, part in (("loss", slice(0, samples)), ("held_out_loss", slice(samples, None))):
        if len(streams.quantized[part]):
            error, power = _mean_squares(streams.quantized[part], streams.full_precision[part], device)
            errors |= {name: error, f"relative_{name}": error / (power or 1.0)}
    return result.with_summary(**errors, seconds=round(seconds, 3))


def _mean_squares(quantized: Tensor, full_precision: Tensor, device: torch.device) -> tuple[float, float]:
    """Return the mean squared error and the mean square of the target over all processes, summed in float64."""
    sums = torch.zeros(2, dtype=torch.float64, device=device)
    for pair in zip(quantized, full_precision, strict=True):
        output, target = (sample.to(device, non_blocking=True).double() for sample in pair)
        sums += torch.stack([(output - target).square().sum(), target.square().sum()])
    error, power = (collectives.all_reduce_sum(sums) / (quantized.numel() * collectives.world_size())).tolist()
    return error, power


def _streams_before(plan: Plan, folder: RunDir, first: int) -> Streams:
    """Return streams at or before the first unfinished block: the saved streams, or the embeddings."""
    saved = folder.load_streams(lambda stream: plan.placement.place(collectives.local_shard(stream)))
    usable = Streams(*saved) if saved is not None and saved[0] <= first else None
    if collectives.all_ranks(usable is not None) and usable is not None:
        return usable
    return Streams.start(plan.embed())


def _keep_streams(plan: Plan, folder: RunDir, streams: Streams) -> None:
    """Write a copy of the streams in the background, if the settings ask for one at this block."""
    every, index = plan.run.save_streams_every, streams.index
    if not every or index % every or index == plan.source.num_blocks:
        return
    snapshot = streams.snapshot(plan.placement.copy_folder)
    if snapshot is not None:
        folder.save_streams_async(snapshot.index, snapshot.full_precision, snapshot.quantized)


def _show(display: Display, index: int, result: BlockResult) -> None:
    parts = [f"{name} {result.summary[name]:.4g}" for name in ("loss", "held_out_loss") if name in result.summary]
    parts += [str(result.summary[name]) for name in ("guard", "unreached", "too few tokens") if name in result.summary]
    display.block(index, "  ".join([*parts, f"{result.summary['seconds']:.1f} s"]))
