# SPDX-License-Identifier: Apache-2.0
"""Checks before the first block: a run that cannot work is refused here."""

import logging
import shutil
from collections.abc import Collection
from math import prod

import torch

from omniq.blocks.activation_hooks import check_attention
from omniq.config.run import Run
from omniq.data.text import one_line
from omniq.distributed import collectives
from omniq.errors import UserError
from omniq.export import cast_for_export, find_format
from omniq.grid.scheme import Scheme
from omniq.models.source import SourceModel
from omniq.storage.block_result import BlockResult

log = logging.getLogger("omniq")


def check_model(run: Run, source: SourceModel) -> None:
    """Refuse a model that scheme, stages, format or disk cannot serve.

    Raises:
        UserError: names what does not fit, and a remedy.
    """
    layouts = [source.layout(index) for index in range(source.num_blocks)]
    for layout in layouts:
        check_attention(layout, run.scheme.activations)
        for stage in run.stages:
            stage.check_layout(layout)
    if run.export.format != "none":
        check_format(run.export.format, run.scheme, source)
    widths = linear_widths(source)
    for name, width in widths.items():
        run.scheme.grid.check_width(width, name, widths.values())
    check_lengths(run, getattr(source.config, "max_position_embeddings", None))
    check_room(run, source, widths)


def check_format(format: str, scheme: Scheme, source: SourceModel) -> None:
    """Refuse a format that cannot hold the layouts and grids of a model.

    Raises:
        UserError: names what does not fit, and a remedy.
    """
    layouts = [source.layout(index) for index in range(source.num_blocks)]
    grids = {scheme.grid_of(name) for name in linear_widths(source)}
    find_format(format).codec(scheme).check(layouts, [grid for grid in grids if grid is not None])


def check_storable(run: Run, block: str, result: BlockResult) -> None:
    """Refuse a finished block whose values the format of the export cannot store, before further blocks are computed.

    Args:
        block: its full name.

    Raises:
        UserError: names the linear.
    """
    if run.export.format == "none":
        return
    codec = find_format(run.export.format).codec(run.scheme)
    for name, linear in result.linears.items():
        codec.check_linear(f"{block}.{name}", linear)


def check_reader(format: str, scheme: Scheme) -> None:
    """Say before a run what this machine lacks to open its checkpoint; omniq can verify it without."""
    chosen = find_format(format)
    lacking = chosen.container.lacks(chosen.codec(scheme))
    if lacking is not None and collectives.rank() == 0:
        log.warning("export.format %s: %s; omniq verifies it with a reader of its own", format, lacking)


def check_compiler(device: torch.device) -> None:
    """Refuse to compile where torch.compile has not what it needs.

    Raises:
        UserError: says what is missing.
    """
    try:
        torch.compile(torch.nn.functional.relu)(torch.zeros(8, device=device))
    except Exception as error:  # every backend has its own
        raise collectives.error_on_rank0(
            f"compile true: torch.compile does not work here ({one_line(error)}): mend that, or set compile to false"
        ) from error


def check_shares(samples: int, held_out: int) -> None:
    """Refuse samples that several processes cannot share evenly.

    Raises:
        UserError: names the number that is not divisible.
    """
    number = collectives.world_size()
    for name, value in (("data.samples", samples), ("data.held_out", held_out)):
        if value % number:
            nearest = value - value % number or number
            raise UserError(f"{name} {value} is not divisible by the {number} processes: give {nearest}")


def check_lengths(run: Run, positions: int | None) -> None:
    """Refuse windows that are longer than the model's positions.

    Raises:
        UserError: names the field and both numbers.
    """
    wanted = {"data": run.data.length} | ({"evaluation": run.evaluation.length} if run.evaluation else {})
    for section, length in wanted.items():
        if positions is not None and length > positions:
            raise UserError(f"{section}.length: {length} tokens exceed the model's {positions} positions: give fewer")


def check_room(run: Run, source: SourceModel, linears: Collection[str]) -> None:
    """Refuse a checkpoint that cannot be written: values beyond its dtype, or a disk without room for it.

    Room is what is left to write at least: a byte for each code that is in no finished block yet, and the checkpoint
    if there is none, without its scales.

    Args:
        linears: full names of those that get codes.

    Raises:
        UserError: names the parameter, or what is needed and what is free.
    """
    codes = sum(prod(source.shape(f"{name}.weight")) for name in linears)
    written = sum(path.stat().st_size for path in (run.out / "blocks").glob("*.safetensors"))
    needed = max(0, codes - written)
    if run.export.format != "none":
        codec = find_format(run.export.format).codec(run.scheme)
        checkpoint = 0
        for name in linears:
            grid = run.scheme.grid_of(name)
            bits = codec.bits(grid) if grid is not None else 8 * run.scheme.export_dtype.itemsize
            checkpoint += prod(source.shape(f"{name}.weight")) * bits // 8
        checkpoint += sum(cast_for_export(name, tensor, run.scheme).nbytes for name, tensor in source.outside())
        needed += 0 if (run.out / "model").exists() else checkpoint
    free = shutil.disk_usage(next(place for place in (run.out, *run.out.absolute().parents) if place.exists())).free
    if free < needed:
        raise UserError(
            f"out {run.out}: the run has {needed:,} bytes to write at least and the disk has {free:,}: free some or "
            "choose another folder"
        )


def linear_widths(source: SourceModel) -> dict[str, int]:
    """Input width of every quantized linear of the model, by full name."""
    names = [f"{source.block_name(i)}.{name}" for i in range(source.num_blocks) for name in source.layout(i).linears]
    return {name: source.shape(f"{name}.weight")[1] for name in names}
