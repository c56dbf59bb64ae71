# SPDX-License-Identifier: Apache-2.0
"""Checks before the first block. They refuse a run that cannot succeed."""

import logging
import shutil
from collections.abc import Mapping
from math import prod

import torch

from omniq.blocks.activation_hooks import check_attention
from omniq.blocks.grids import scheme_grids, scheme_layout
from omniq.callbacks.checkpoint import PassCheckpoint
from omniq.callbacks.fuse import Fuse
from omniq.callbacks.guard import NonFiniteGuard
from omniq.callbacks.losses import BlockLosses
from omniq.callbacks.progress import BlockProgress
from omniq.callbacks.settle import Settle
from omniq.config.run import Run
from omniq.data import Calibration
from omniq.distributed import collectives
from omniq.errors import UserError, one_line
from omniq.export import cast_for_export, check_format, find_format
from omniq.grid.affine import Grid
from omniq.grid.scheme import Scheme
from omniq.models.source import SourceModel
from omniq.storage.block_result import BlockResult

log = logging.getLogger("omniq")


def check_callbacks(run: Run) -> None:
    """Refuse callbacks that omniq adds to every fit itself, and a second guard.

    Raises:
        UserError: names the class.
    """
    internal = (BlockLosses, BlockProgress, Fuse, PassCheckpoint, Settle)
    # a factory is a class, or a partial that holds one
    parts = [part for make in run.callbacks for part in (make, getattr(make, "func", None), *getattr(make, "args", ()))]
    kinds = [part for part in parts if isinstance(part, type)]
    for kind in kinds:
        if issubclass(kind, internal):
            raise UserError(f"callbacks: {kind.__name__} is an internal part of every fit: remove it")
    guards = [kind.__name__ for kind in kinds if issubclass(kind, NonFiniteGuard)]
    if len(guards) > 1:
        raise UserError(f"callbacks: {' and '.join(guards)} are two guards of one fit: remove one of them")


def check_model(run: Run, source: SourceModel) -> None:
    """Refuse a model that does not fit the scheme, the stages, the export format or the disk.

    Raises:
        UserError: names the conflict and a remedy.
    """
    check_rules(run, source)
    layouts = [scheme_layout(source, run.scheme, index) for index in range(source.num_blocks)]
    for layout in layouts:
        check_attention(layout, run.scheme.activations)
        for stage in run.stages:
            stage.check_layout(layout)
    for export in run.exports:
        check_format(export.format, run.scheme, source=source, container_bits=export.container_bits)
    grids = {name: run.scheme.grid_of(name) for name in linear_names(source)}
    check_widths(source, grids)
    check_lengths(run, getattr(source.config, "max_position_embeddings", None))
    check_disk_space(run, source, grids)


def check_widths(source: SourceModel, grids: Mapping[str, Grid | None]) -> None:
    """Refuse a grid whose groups do not divide the inputs of a linear.

    Args:
        grids: the grid of each linear, by full name; None for a linear in floating point.

    Raises:
        UserError: names the linear, its inputs and the group sizes that fit all linears on this grid.
    """
    widths: dict[Grid, dict[str, int]] = {}
    for name, grid in grids.items():
        if grid is not None:
            widths.setdefault(grid, {})[name] = source.shape(f"{name}.weight")[1]
    for grid, same in widths.items():
        for name, width in same.items():
            grid.check_width(width, name, same.values())


def check_storable(run: Run, block: str, result: BlockResult) -> None:
    """Refuse a finished block whose values the export format cannot store, before the next blocks are computed.

    Args:
        run: the configuration.
        block: full name of the block.
        result: result of the block.

    Raises:
        UserError: names the linear.
    """
    for export in run.exports:
        codec = find_format(export.format).codec(run.scheme)
        for name, linear in result.linears.items():
            codec.check_linear(f"{block}.{name}", linear)


def check_reader(format: str, scheme: Scheme) -> None:
    """Warn before a run if this machine lacks the reader of its checkpoint. omniq can verify without that reader."""
    chosen = find_format(format)
    lacking = chosen.container.lacks(chosen.codec(scheme))
    if lacking is not None and collectives.rank() == 0:
        log.warning("export.format %s: %s; omniq verifies the checkpoint with its own reader", format, lacking)


def check_compiler(device: torch.device) -> None:
    """Raise if torch.compile does not work on this machine.

    Raises:
        UserError: names the missing part.
    """
    try:
        torch.compile(torch.nn.functional.relu)(torch.zeros(8, device=device))
    except Exception as error:  # every backend raises its own type of error
        raise collectives.error_on_rank0(
            f"compile true: torch.compile does not work here ({one_line(error)}): fix that, or set compile to false"
        ) from error


def check_divisible(samples: int, held_out: int) -> None:
    """Refuse samples that several processes cannot share evenly.

    Raises:
        UserError: names the number that is not divisible.
    """
    number = collectives.world_size()
    for name, value in (("data.samples", samples), ("data.held_out", held_out)):
        if value % number:
            nearest = value - value % number or number
            raise UserError(f"{name} {value} is not divisible by the {number} processes: give {nearest}")


def check_text(data: Calibration, distinct: int) -> None:
    """Warn if the text holds fewer windows than the run draws from it.

    Args:
        data: the settings.
        distinct: the number of windows without a common token that the text holds.
    """
    if distinct < data.samples and collectives.rank() == 0:
        log.warning(
            "data.samples %d: the text holds %d windows of %d tokens, so the windows repeat parts of it; more text "
            "gives a better result, and data.samples %d is faster",
            *(data.samples, distinct, data.length, distinct),
        )


def check_lengths(run: Run, positions: int | None) -> None:
    """Refuse sequences that are longer than the model's context.

    Raises:
        UserError: names the field and both numbers.
    """
    wanted = {"data": run.data.length} | ({"evaluation": run.evaluation.length} if run.evaluation else {})
    for section, length in wanted.items():
        if positions is not None and length > positions:
            raise UserError(f"{section}.length: {length} tokens exceed the model's {positions} positions: give fewer")


def check_disk_space(run: Run, source: SourceModel, grids: Mapping[str, Grid | None]) -> None:
    """Refuse a checkpoint that cannot be written: values exceed its dtype, or the disk has too little free space.

    The required space is a lower bound of the bytes still to write. It counts the blocks that are not finished, with
    one byte per code and the weights of linears in floating point, and the checkpoint without its scales if it does
    not exist yet.

    Args:
        run: the configuration.
        source: the opened model.
        grids: the grid of each linear, by full name; None for a linear in floating point.

    Raises:
        UserError: names the parameter, or the required and the free bytes.
    """
    numbers = {name: prod(source.shape(f"{name}.weight")) for name in grids}
    sizes = [number * (source.dtype.itemsize if grids[name] is None else 1) for name, number in numbers.items()]
    written = sum(path.stat().st_size for path in (run.out / "blocks").glob("*.safetensors"))
    needed, outside = max(0, sum(sizes) - written), 0
    if run.exports:
        outside = sum(cast_for_export(name, tensor, run.scheme).nbytes for name, tensor in source.outside())
    for export in run.exports:
        codec, plain = find_format(export.format).codec(run.scheme), 8 * run.scheme.export_dtype.itemsize
        bits = {name: codec.bits(grid) if grid else plain for name, grid in grids.items()}
        checkpoint = sum(numbers[name] * bits[name] for name in grids) // 8
        checkpoint += outside
        needed += 0 if run.folder_of(export).exists() else checkpoint
    free = shutil.disk_usage(next(place for place in (run.out, *run.out.absolute().parents) if place.exists())).free
    if free < needed:
        raise UserError(
            f"out {run.out}: the run writes at least {needed:,} bytes and the disk has {free:,} free: free some space "
            "or choose another folder"
        )


def linear_names(source: SourceModel) -> list[str]:
    """Return the full names of the linears that omniq can quantize, in order."""
    blocks = range(source.num_blocks)
    return [f"{source.block_name(index)}.{name}" for index in blocks for name in source.layout(index).linears]


def check_rules(run: Run, source: SourceModel) -> None:
    """Refuse rules that do not decide the grid of any linear, and a scheme that quantizes no linear.

    Raises:
        UserError: names the rule, and the names of linears or a linear that later rules decide.
    """
    scheme = run.scheme
    names = linear_names(source)
    deciding = {id(scheme.rule_of(name)) for name in names}
    for rule in scheme.rules:
        matched = [name for name in names if rule.matches(name)]
        if not matched:
            raise UserError(
                f"scheme.rules: layers {rule.layers!r} matches no linear of {run.model.path}: its linears are named "
                f"{names[0]} to {names[-1]}"
            )
        if id(rule) not in deciding:
            raise UserError(
                f"scheme.rules: layers {rule.layers!r} has no effect, because later rules match all of its linears, "
                f"such as {matched[0]}: move it after them, or remove it"
            )
    if not any(scheme_grids(source, scheme, index) for index in range(source.num_blocks)[: run.blocks]):
        raise UserError(
            "scheme.rules leave every linear in floating point: give at least one linear of the blocks to quantize "
            "a name other than none"
        )
