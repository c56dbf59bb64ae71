# SPDX-License-Identifier: Apache-2.0
"""Apply a scheme to one block: which linears are quantized, and on which grid."""

from omniq.grid.affine import Grid
from omniq.grid.scheme import Scheme
from omniq.models.layout import Layout
from omniq.models.source import SourceModel


def scheme_layout(source: SourceModel, scheme: Scheme, index: int) -> Layout:
    """Return the layout of a block. It keeps linears that a rule leaves in floating point, with the rule as reason."""
    layout, block = source.layout(index), source.block_name(index)
    for name in layout.linears:
        rule = scheme.rule_of(f"{block}.{name}")
        if rule is not None and rule.weights is None:
            layout = layout.keep((name,), f"scheme.rules, {rule}")
    return layout


def scheme_grids(source: SourceModel, scheme: Scheme, index: int) -> dict[str, Grid]:
    """Return the grid of each quantized linear of a block, by name inside the block."""
    block = source.block_name(index)
    grids = ((name, scheme.grid_of(f"{block}.{name}")) for name in source.layout(index).linears)
    return {name: grid for name, grid in grids if grid is not None}
