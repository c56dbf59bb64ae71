# SPDX-License-Identifier: Apache-2.0
"""Restate quantized linears on other grids that hold the same weights: wider codes, or groups instead of channels.

    wider codes   q' = q - z + 2^(c-1),  z' = 2^(c-1),  s' = s    from a grid of b bits to a symmetric one of c > b bits
    groups        each scale and zero point is repeated           from a grid per channel to one with groups

``(q - z) s`` keeps every bit: ``q - z`` lies in ``[1 - 2^b, 2^b - 1]``, and therefore ``q'`` in ``[1, 2^c - 1]``.
Runtimes without codes of 2 or 3 bits, without zero points, or without scales per channel can hold such a linear. It
takes the space of the grid on which it is stored.

The stored scheme describes a checkpoint as the scheme of a run describes its blocks.

Shapes: ``o`` output features, ``i`` input features, ``G`` groups of a row.
"""

from collections.abc import Collection, Mapping
from dataclasses import replace
from math import prod

import torch

from omniq.blocks.grids import scheme_grids
from omniq.errors import UserError
from omniq.export.containers.container import Results
from omniq.export.formats.codec import Shape
from omniq.grid.affine import Grid
from omniq.grid.name import SchemeName
from omniq.grid.scheme import Scheme
from omniq.models.source import SourceModel
from omniq.storage.block_result import BlockResult, QuantizedLinear


def stored_scheme(
    scheme: Scheme, shapes: Mapping[str, Shape], *, container_bits: int | None, groups: Collection[int]
) -> Scheme:
    """The scheme of a checkpoint, by the scheme of its run.

    Args:
        scheme: the scheme of the run.
        shapes: outputs and inputs of the quantized linears by full name; empty if they are not known yet.
        container_bits: bits of stored codes for narrower grids; None to store every grid in its own bits.
        groups: the group sizes that may replace scales per channel, the best first. The first size is taken that
            divides the inputs of all linears with scales per channel; if none does, the scales stay per channel.

    Raises:
        UserError: no grid has fewer than ``container_bits`` bits.
    """
    if container_bits is not None and all(grid.bits >= container_bits for grid in scheme.grids):
        raise UserError(
            f"export.container_bits {container_bits}: scheme {scheme} has no grid of fewer than {container_bits} bits: "
            "remove the setting"
        )
    grids = ((scheme.grid_of(name), inputs) for name, (_, inputs) in shapes.items())
    inputs = {width for grid, width in grids if grid is not None and grid.group_size == -1}
    group = next((size for size in groups if inputs and not any(width % size for width in inputs)), -1)
    if container_bits is None and group == -1:
        return scheme

    def stored(name: SchemeName, symmetric: bool) -> tuple[str, bool]:
        wider = container_bits is not None and name.bits < container_bits
        name = name._replace(group_size=group) if name.group_size == -1 else name
        return str(name._replace(bits=container_bits) if container_bits and wider else name), symmetric or wider

    rules = []
    for rule in scheme.rules:
        if rule.weights is not None:
            own = scheme.symmetric if rule.symmetric is None else rule.symmetric
            text, own = stored(rule.weights, own)
            rule = replace(rule, name=text, symmetric=own)
        rules.append(rule)
    text, symmetric = stored(scheme.parsed, scheme.symmetric)
    return replace(scheme, name=text, symmetric=symmetric, rules=tuple(rules))


def restated(source: SourceModel, results: Results, scheme: Scheme) -> Results:
    """Finished blocks with all linears on the grids of the stored scheme.

    Args:
        source: names the blocks.
        results: fetches a finished block by its index.
        scheme: the stored scheme.
    """

    def fetch(index: int) -> BlockResult:
        result, grids = results(index), scheme_grids(source, scheme, index)
        return replace(result, linears={name: restate(linear, grids[name]) for name, linear in result.linears.items()})

    return fetch


def restate(linear: QuantizedLinear, grid: Grid) -> QuantizedLinear:
    """The same weights on the grid of a stored scheme.

    Raises:
        ValueError: the grid does not hold the weights of the linear.
    """
    if grid == linear.grid:
        return linear
    narrower = grid.bits < linear.grid.bits or (grid.bits > linear.grid.bits and not grid.symmetric)
    if narrower or linear.grid.group_size not in (-1, grid.group_size):
        raise ValueError(f"{grid} does not hold weights on {linear.grid}")
    codes, scale, zero_point = linear.codes, linear.scale, linear.zero_point
    if grid.bits != linear.grid.bits:
        middle = 2 ** (grid.bits - 1)
        codes = (codes + linear.grid.expand(middle - zero_point.to(torch.int16), codes.shape[1])).to(torch.uint8)
        zero_point = torch.full_like(zero_point, middle)
    repeats = grid.groups(codes.shape[1]) // scale.shape[1]
    scale, zero_point = (part.repeat_interleave(repeats, dim=1) for part in (scale, zero_point))
    return replace(linear, grid=grid, codes=codes, scale=scale, zero_point=zero_point)


def stored_bits_per_weight(scheme: Scheme, shapes: Mapping[str, Shape]) -> float:
    """Bits of codes, scales and zero points on the grids of a scheme, divided by the number of weights."""
    bits = weights = 0
    for name, shape in shapes.items():
        if (grid := scheme.grid_of(name)) is not None:
            outputs, inputs = shape
            group = 8 * grid.scale_dtype.itemsize + (0 if grid.symmetric else grid.bits)
            bits += prod(shape) * grid.bits + outputs * grid.groups(inputs) * group
            weights += prod(shape)
    return bits / weights
