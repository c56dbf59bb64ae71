# SPDX-License-Identifier: Apache-2.0
"""Checks before the first block: a run that cannot work is refused here."""

import shutil
from collections.abc import Iterable, Mapping
from math import prod
from typing import Any

import torch
from torch import Tensor

from omniq.blocks.activation_hooks import check_attention
from omniq.calibration.fuse import concerns
from omniq.calibration.verify_equivalences import TOLERANCE, VerifiedBlock
from omniq.config.run import Run
from omniq.data.text import one_line
from omniq.distributed import collectives
from omniq.errors import UserError
from omniq.export import cast_for_export, find_format
from omniq.models.source import SourceModel
from omniq.transforms.equivalence import Equivalence

_VERIFIED_TOKENS = 32  # on which equivalences are tried


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


def verify_equivalences(run: Run, source: SourceModel, tokens: Tensor, device: torch.device) -> None:
    """Try every equivalence that the stages use on the real first block of each kind.

    Args:
        tokens: int64 ``[n, t]``; a few of the first sample are embedded.
        device: where the blocks compute.

    Raises:
        UserError: an equivalence changes the output of a block.
    """
    embedded, verified = None, set()
    for index in range(source.num_blocks if run.blocks is None else min(run.blocks, source.num_blocks)):
        layout = source.layout(index)
        kinds = {kind for stage in run.stages for kind in stage.equivalence_kinds(layout, run.scheme.activations)}
        used = tuple(each for each in layout.equivalences if each.kind in kinds and concerns(layout, each))
        key = (used, layout.heads, layout.can_bias, source.structure(index))
        if not used or key in verified:
            continue
        verified.add(key)
        embedded = embedded or source.embed(tokens[:1, :_VERIFIED_TOKENS], device)
        _verify_block(source, index, used, embedded[0], embedded[1][index])
    if device.type == "cuda":
        torch.cuda.empty_cache()  # the free memory decides where the streams live


def _verify_block(
    source: SourceModel, index: int, used: Iterable[Equivalence], hidden: Tensor, arguments: Mapping[str, Any]
) -> None:
    """Try these equivalences on one block, which is released on return."""
    dtype = torch.float32 if hidden.device.type == "mps" else torch.float64  # Apple's GPUs have no float64
    layout = source.layout(index)
    block = VerifiedBlock(source.block(index, hidden.device, dtype), layout, hidden, arguments, dtype)
    for equivalence in used:
        if not (error := block.error(equivalence)) <= TOLERANCE[dtype]:
            raise UserError(
                f"{source.block_name(index)}: the equivalence {equivalence} changes the output of the block by "
                f"{error:.1e} of what the block adds, and {TOLERANCE[dtype]:.0e} is allowed: leave "
                f"{equivalence.kind!r} out of the equivalences of the stage, or correct how the family of "
                f"{layout.model_type} declares it"
            )


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
