# SPDX-License-Identifier: Apache-2.0
"""Checks before the first block: a run that cannot work is refused here."""

import shutil
from collections.abc import Iterable
from math import prod

import torch

from omniq.blocks.activation_hooks import check_attention
from omniq.callbacks import BlockLosses, BlockProgress, Fuse, NonFiniteGuard, PassCheckpoint, Settle
from omniq.config.run import Run
from omniq.data.text import one_line
from omniq.distributed import collectives
from omniq.errors import UserError
from omniq.export import cast_for_export, find_format
from omniq.models.source import SourceModel


def check_callbacks(run: Run) -> None:
    """Refuse callbacks that every fit has already, and a second guard.

    Raises:
        UserError: names the class.
    """
    internal = (BlockLosses, BlockProgress, Fuse, PassCheckpoint, Settle)
    # a factory is a class, or a partial that holds one
    parts = [part for make in run.callbacks for part in (make, getattr(make, "func", None), *getattr(make, "args", ()))]
    kinds = [part for part in parts if isinstance(part, type)]
    for kind in kinds:
        if issubclass(kind, internal):
            raise UserError(f"callbacks: {kind.__name__} is an internal part of every fit: leave it out")
    guards = [kind.__name__ for kind in kinds if issubclass(kind, NonFiniteGuard)]
    if len(guards) > 1:
        raise UserError(f"callbacks: {' and '.join(guards)} are two guards of one fit: leave one of them out")


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
        find_format(run.export.format).check(run.scheme, layouts)
    widths = linear_widths(source)
    for name, width in widths.items():
        run.scheme.grid.check_width(width, name, widths.values())
    check_lengths(run, getattr(source.config, "max_position_embeddings", None))
    check_room(run, source, widths)


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


def check_room(run: Run, source: SourceModel, linears: Iterable[str]) -> None:
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
        checkpoint = codes * find_format(run.export.format).code_bits(run.scheme) // 8
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
