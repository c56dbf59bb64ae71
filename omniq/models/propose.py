# SPDX-License-Identifier: Apache-2.0
"""Equivalences that a traced block may have. Each proposal is verified on the block before it is believed.

- Norm to linears: a norm and all linears that read its output; the norm multiplies by ``w`` or by ``1 + w``.
- Queries and keys: two linears that read the same input, or rows of a fused linear, with or without norms of heads.
- Value to output: a linear, or the values among the rows of a fused linear, and a later linear that alone reads as many
  inputs as the heads of attention give it. Fused rows are ``[q | k | v]``, or ``[q .. q k v]`` of each KV head.
- Up to down: a linear, or one half of a fused linear, and a later linear that alone reads as many inputs. The function
  between them is homogeneous of degree 1 (gated MLP, ReLU) or 2 (squared ReLU).

A norm or linear that only some tokens reach (experts) is left out: no test on a few tokens could refute it.
"""

from collections.abc import Collection, Iterator, Mapping
from typing import Any

from torch import nn

from omniq.models.trace import Trace
from omniq.transforms.equivalence import Equivalence
from omniq.transforms.equivalences import NormToLinears, QueryKey, UpToDown, ValueToOutput
from omniq.transforms.heads import Heads
from omniq.transforms.linear_ref import Linear, LinearRef


def proposals(
    block: nn.Module, traced: Trace, heads: Heads, routers: Collection[str] = ()
) -> Iterator[tuple[Equivalence, ...]]:
    """Alternatives in groups: at most one equivalence of a group can hold, and the first that does is taken.

    Args:
        block: the block.
        traced: its trace.
        heads: its attention heads, with the number of channels that rotary embedding turns.
        routers: linears whose outputs choose experts; no scale moves between them and other linears.
    """
    linears: dict[str, Any] = {name: block.get_submodule(name) for name in traced.inputs if not expert_of(name)}
    for norm, output in traced.norms.items():
        readers = traced.readers(output)
        width = _width(block, norm)
        if readers and all(name in linears and linears[name].in_features == width for name in readers):
            yield tuple(NormToLinears(norm, readers, offset, shift) for shift in (True, False) for offset in (0.0, 1.0))
    names = [name for name in linears if name not in routers]
    if found := tuple(_query_key(block, linears, traced, heads)):
        yield found
    for position, first in enumerate(names):
        for later in names[position + 1 :]:
            key = traced.inputs[later]
            if traced.readers(key) != (later,) or key in traced.norms.values():
                continue
            rows, width = linears[first].weight.shape[0], linears[later].weight.shape[1]
            if found := (*_value_to_output(first, rows, later, width, heads), *_up_to_down(first, rows, later, width)):
                yield found


def _value_to_output(first: str, rows: int, output: str, width: int, heads: Heads) -> Iterator[Equivalence]:
    size, rest = divmod(width, heads.query)  # of one head
    values: list[Linear] = []
    if not rest and rows == heads.key * size:
        values = [first]
    elif not rest and rows == (heads.query + 2 * heads.key) * size:
        values = [value for _, _, value in _fused(first, size, heads)]
    for shift in (True, False):
        yield from (ValueToOutput(value, output, shift) for value in values)


def _query_key(block: nn.Module, linears: Mapping[str, Any], traced: Trace, heads: Heads) -> Iterator[Equivalence]:
    pairs: list[tuple[Linear, Linear, int]] = []  # queries, keys, size of a head
    for first, linear in linears.items():
        rows = linear.out_features
        size, rest = divmod(rows, heads.query + 2 * heads.key)
        pairs += [] if rest else [(query, key, size) for query, key, _ in _fused(first, size, heads)]
        size, rest = divmod(rows, heads.query)
        others = [name for name in traced.readers(traced.inputs[first]) if name in linears and name != first]
        keys = [name for name in others if linears[name].out_features == heads.key * size]
        pairs += [] if rest else [(first, key, size) for key in keys]
    for query, key, size in pairs:
        own = LinearRef.of(query).name.rpartition(".")[0]
        norms = [name for name in traced.norms if name.rpartition(".")[0] == own]
        widths = zip(norms, (heads.query * size, heads.key * size), strict=False)
        of_heads = all(_width(block, norm) in (size, width) for norm, width in widths)
        for rotary in (None, "half", "interleaved"):
            yield QueryKey(query, key, rotary)
            if len(norms) == 2 and of_heads:
                yield QueryKey(query, key, rotary, norms[0], norms[1], offset=0.0)
                yield QueryKey(query, key, rotary, norms[0], norms[1], offset=1.0)


def _fused(name: str, size: int, heads: Heads) -> Iterator[tuple[LinearRef, ...]]:
    """Queries, keys and values in a fused linear: ``[q | k | v]``, or ``[q .. q k v]`` of each KV head."""
    yield LinearRef.split(name, (heads.query * size, heads.key * size, heads.key * size))
    if heads.key > 1:
        yield LinearRef.split(name, (heads.query // heads.key * size, size, size), repeated=True)


def _width(block: nn.Module, norm: str) -> int:
    weight: Any = block.get_submodule(norm).weight
    return int(weight.numel())


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
