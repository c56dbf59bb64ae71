# SPDX-License-Identifier: Apache-2.0
"""``omniq inspect``: the structure of a model as omniq quantizes it. The command writes no file.

It opens the model, runs the first block of each kind a few times on random tokens, and reports the kinds of blocks,
their linears, the equivalences with their measured errors, the group sizes that divide all inputs, and the formats that
can hold the model.
"""

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from math import prod
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

from omniq.blocks.activation_hooks import check_attention
from omniq.config.run import Model
from omniq.errors import UserError
from omniq.export import check_format
from omniq.export.registry import FORMATS
from omniq.grid.dtypes import dtype_name
from omniq.grid.scheme import Scheme
from omniq.models.discover import random_tokens
from omniq.models.self_test import check_streaming
from omniq.models.source import SourceModel
from omniq.models.verify_equivalences import TOLERANCE, VerifiedBlock
from omniq.report.console import plain_console

GROUP_SIZES = (16, 32, 64, 128, 256)
SCHEMES = ("W4A16", "W8A8", "W4A4KV4")
_CPU = torch.device("cpu")


@dataclass(frozen=True)
class Kind:
    """Blocks that share a layout.

    Args:
        blocks: their indices.
        linears: the quantized linears in groups that share an input: shape ``[o, i]`` by name.
        kept: matrices that stay in floating point, with the reason.
        attention: the module whose queries, keys and values can be quantized; None if no module allows it.
        equivalences: the measured error of each equivalence that holds.
        rejected: the measured error of each equivalence that does not hold.
    """

    blocks: list[int]
    linears: list[dict[str, tuple[int, ...]]]
    kept: dict[str, str]
    attention: str | None
    equivalences: dict[str, float]
    rejected: dict[str, float]


def inspect_model(model: Model, as_json: bool) -> None:
    """Print what omniq finds in a model.

    Raises:
        UserError: the model cannot be opened, or cannot be quantized block by block.
    """
    source = SourceModel.open(
        model.path, model.gguf_file, attention=model.attention, trust_remote_code=model.trust_remote_code
    )
    check_streaming(source, _CPU)
    found = describe(source)
    console = plain_console()
    if as_json:
        print(json.dumps(found, indent=2))
    else:
        _show(console, found)


def describe(source: SourceModel) -> dict[str, Any]:
    """Everything that the command prints, as JSON holds it."""
    kinds = [*_kinds(source)]
    linears = {f"{number} {name}": shape for number, kind in enumerate(kinds) for name, shape in _flat(kind).items()}
    inner = sum(prod(shape) for name, shape in source.shapes() if name.startswith(f"{source.family.blocks}."))
    quantized = sum(len(kind.blocks) * prod(shape) for kind in kinds for shape in _flat(kind).values())
    return {
        "model": source.path,
        "type": source.config.model_type,
        "family": "declared" if source.family.groups else "discovered",
        "dtype": dtype_name(source.dtype),
        "parameters": sum(prod(shape) for _, shape in source.shapes()),
        "parameters of blocks": inner,
        "quantized weights": quantized,
        "blocks": source.num_blocks,
        "kinds": [vars(kind) for kind in kinds],
        "group sizes": [size for size in GROUP_SIZES if not any(shape[1] % size for shape in linears.values())],
        "formats": {name: {scheme: _obstacle(source, name, scheme) for scheme in SCHEMES} for name in FORMATS},
    }


def _kinds(source: SourceModel) -> Iterator[Kind]:
    """The kinds of blocks, with equivalences measured on the first block of each kind."""
    hidden, arguments = source.embed(random_tokens(source, 1))
    source.release()
    kinds = source.kinds(arguments)
    for first in sorted(set(kinds)):
        layout = source.layout(first)
        prefix = source.block_name(first)
        errors = _measure(source, first, hidden, arguments[first])
        yield Kind(
            blocks=[index for index, kind in enumerate(kinds) if kind == first],
            linears=[{name: source.shape(f"{prefix}.{name}.weight") for name in group} for group in layout.groups],
            kept=dict(layout.kept),
            attention=layout.attention,
            equivalences={name: error for name, (error, most) in errors.items() if error <= most},
            rejected={**{name: error for name, (error, most) in errors.items() if error > most}, **layout.rejected},
        )


def _measure(
    source: SourceModel, index: int, hidden: Tensor, arguments: Mapping[str, Any]
) -> dict[str, tuple[float, float]]:
    """The error of each equivalence of a block, and the largest error that is allowed."""
    layout = source.layout(index)
    for dtype in (torch.float64, torch.float32):
        try:
            block = VerifiedBlock(source.block(index, _CPU, dtype), layout, hidden, arguments, dtype)
        except RuntimeError:  # an operator without float64
            continue
        return {str(each): (block.error(each), TOLERANCE[dtype]) for each in layout.equivalences}
    raise UserError(f"{source.block_name(index)} runs neither in float64 nor in float32: choose another model")


def _obstacle(source: SourceModel, format: str, scheme: str) -> str | None:
    """The reason why a format cannot hold the model in a scheme; None if it can."""
    chosen = Scheme(scheme)
    try:
        for index in range(source.num_blocks):
            check_attention(source.layout(index), chosen.activations)
        check_format(format, chosen, source=source)
    except UserError as error:
        return str(error)
    return None


def _flat(kind: Kind) -> dict[str, tuple[int, ...]]:
    return {name: shape for group in kind.linears for name, shape in group.items()}


def _show(console: Console, found: Mapping[str, Any]) -> None:
    """Print the description as tables."""
    share = found["quantized weights"] / found["parameters of blocks"]
    console.print(
        f"{found['model']}: type {found['type']} ({found['family']} family), {found['dtype']}, "
        f"{found['parameters']:,} parameters, {found['blocks']} blocks; linears hold {share:.1%} of their parameters"
    )
    for kind in found["kinds"]:
        table = Table("linear", "outputs", "inputs", "reads", title=f"blocks {_ranges(kind['blocks'])}")
        for number, group in enumerate(kind["linears"]):
            for name, (outputs, inputs) in group.items():
                table.add_row(name, f"{outputs:,}", f"{inputs:,}", f"input {number}")
        console.print(table)
        for name, reason in kind["kept"].items():
            console.print(f"  kept in floating point: {name} ({reason})")
        for name, error in kind["equivalences"].items():
            console.print(f"  verified: {name} (error {error:.0e})")
        for name, error in kind["rejected"].items():
            console.print(f"  does not hold: {name} (error {error:.0e})")
        can = "can" if kind["attention"] else "cannot"
        console.print(f"  queries, keys and values {can} be quantized")
    console.print(f"group sizes that fit: {', '.join(map(str, found['group sizes'])) or 'none'}, and one per channel")
    table = Table("format", *SCHEMES, title="formats")
    for name, obstacles in found["formats"].items():
        table.add_row(name, *("no" if obstacle else "yes" for obstacle in obstacles.values()))
    console.print(table)


def _ranges(indices: list[int]) -> str:
    """``0-3, 5`` for ``[0, 1, 2, 3, 5]``."""
    runs: list[list[int]] = []
    for index in indices:
        if runs and index == runs[-1][-1] + 1:
            runs[-1].append(index)
        else:
            runs.append([index])
    return ", ".join(str(run[0]) if len(run) == 1 else f"{run[0]}-{run[-1]}" for run in runs)
