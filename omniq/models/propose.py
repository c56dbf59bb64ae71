# SPDX-License-Identifier: Apache-2.0
"""Equivalences that a traced block may have. Each proposal is verified on the block before it is believed.

- Norm to linears: a norm and all linears that read its output; the norm multiplies by ``w`` or by ``1 + w``.
- Value to output: a linear, or the values among the rows of a fused linear, and a later linear that alone reads as many
  inputs as the heads of attention give it. Fused rows are ``[q | k | v]``, or ``[q .. q k v]`` of each KV head.
- Up to down: a linear, or one half of a fused linear, and a later linear that alone reads as many inputs. The function
  between them is homogeneous of degree 1 (gated MLP, ReLU) or 2 (squared ReLU).

A norm or linear that only some tokens reach (experts) is left out: no test on a few tokens could refute it.
"""

from collections.abc import Collection, Iterator
from typing import Any

from torch import nn

from omniq.models.trace import Trace
from omniq.transforms.equivalence import Equivalence
from omniq.transforms.equivalences import NormToLinears, UpToDown, ValueToOutput
from omniq.transforms.heads import Heads
from omniq.transforms.linear_ref import Linear, LinearRef


def proposals(
    block: nn.Module, traced: Trace, heads: Heads, routers: Collection[str] = ()
) -> Iterator[tuple[Equivalence, ...]]:
    """Alternatives in groups: at most one equivalence of a group can hold, and the first that does is taken.

    Args:
        block: the block.
        traced: its trace.
        heads: its attention heads.
        routers: linears whose outputs choose experts; no scale moves between them and other linears.
    """
    linears: dict[str, Any] = {name: block.get_submodule(name) for name in traced.inputs if not expert_of(name)}
    for norm, output in traced.norms.items():
        readers = traced.readers(output)
        weight: Any = block.get_submodule(norm).weight
        width = weight.numel()
        if readers and all(name in linears and linears[name].in_features == width for name in readers):
            yield tuple(NormToLinears(norm, readers, offset, shift) for shift in (True, False) for offset in (0.0, 1.0))
    names = [name for name in linears if name not in routers]
    for position, first in enumerate(names):
        for later in names[position + 1 :]:
            key = traced.inputs[later]
            if traced.readers(key) != (later,) or key in traced.norms.values():
                continue
            rows, width = linears[first].weight.shape[0], linears[later].weight.shape[1]
            found = [*_value_to_output(first, rows, later, width, heads), *_up_to_down(first, rows, later, width)]
            if found:
                yield tuple(found)


def _value_to_output(first: str, rows: int, output: str, width: int, heads: Heads) -> Iterator[Equivalence]:
    size, rest = divmod(width, heads.query)  # of one head
    values: list[Linear] = []
    if not rest and rows == heads.key * size:
        values = [first]
    elif not rest and rows == (heads.query + 2 * heads.key) * size:
        values = [LinearRef(first, (rows - heads.key * size, rows))]
        if heads.key > 1:
            of_one_head = (heads.query // heads.key * size, size, size)
            values.append(LinearRef.split(first, of_one_head, repeated=True)[2])
    for shift in (True, False):
        yield from (ValueToOutput(value, output, shift) for value in values)


def _up_to_down(first: str, rows: int, down: str, width: int) -> Iterator[Equivalence]:
    ups: tuple[Linear, ...] = ()
    if rows == width:
        ups = (first,)
    elif rows == 2 * width:
        ups = LinearRef.split(first, (width, width))
    for power in (1.0, 2.0):
        yield from (UpToDown(up, down, power) for up in ups)


def expert_of(name: str) -> str | None:
    """``mlp.experts.3`` for a module inside it, such as ``mlp.experts.3.up_proj``; None without a number."""
    parts = name.split(".")
    last = max((k for k, part in enumerate(parts) if part.isdigit()), default=None)
    return None if last is None else ".".join(parts[: last + 1])


def expert_number(expert: str) -> int:
    """3 for ``mlp.experts.3``."""
    return int(expert.rpartition(".")[2])


def pattern(name: str) -> str:
    """``mlp.experts.*.up_proj``: the same for all experts of a block."""
    return ".".join("*" if part.isdigit() else part for part in name.split("."))
