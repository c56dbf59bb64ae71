# SPDX-License-Identifier: Apache-2.0
"""Check before a run, and again before writing, that a format holds the scheme and the model."""

from collections.abc import Mapping, Sequence

from omniq.blocks.grids import scheme_grids, scheme_layout
from omniq.errors import UserError
from omniq.export.formats.codec import Shape
from omniq.export.registry import FORMATS, Format, find_format
from omniq.export.restate import stored_scheme
from omniq.grid.affine import Grid
from omniq.grid.scheme import Scheme
from omniq.models.layout import Layout
from omniq.models.source import SourceModel


def check_format(
    format: str,
    scheme: Scheme,
    *,
    source: SourceModel | None = None,
    container_bits: int | None = None,
    outliers: bool = False,
) -> Scheme:
    """Refuse a format that cannot hold a scheme and a model.

    Args:
        format: a name in ``FORMATS``.
        scheme: the scheme of the run.
        source: the model, if it is already open.
        container_bits: bits of stored codes for narrower grids.
        outliers: True if linears have a sparse part or quantized scales.

    Returns:
        the scheme of the checkpoint.

    Raises:
        UserError: names the conflict, a remedy, and the formats that can hold scheme and model.
    """
    chosen = find_format(format)
    if container_bits is not None and outliers:
        raise UserError(
            f"export.container_bits {container_bits} does not support outliers or quantized scales: remove the setting"
        )
    layouts, shapes = ([], {}) if source is None else (_layouts(source, scheme), linear_shapes(source, scheme))
    stored = _stored(chosen, scheme, shapes, container_bits)
    try:
        _check(chosen, stored, source, layouts, shapes, outliers)
    except UserError as error:
        able = []
        for other in FORMATS.values():
            try:
                _check(other, _stored(other, scheme, shapes, container_bits), source, layouts, shapes, outliers)
                able.append(other.name)
            except UserError:
                continue
        raise UserError(f"{error}; formats that can hold it: {', '.join(able) or 'none'}") from error
    return stored


def linear_shapes(source: SourceModel, scheme: Scheme) -> dict[str, Shape]:
    """Outputs and inputs of all quantized linears by full name."""
    found: dict[str, Shape] = {}
    for index in range(source.num_blocks):
        for name in scheme_grids(source, scheme, index):
            outputs, inputs = source.shape(f"{source.block_name(index)}.{name}.weight")
            found[f"{source.block_name(index)}.{name}"] = (outputs, inputs)
    return found


def _layouts(source: SourceModel, scheme: Scheme) -> list[Layout]:
    return [scheme_layout(source, scheme, index) for index in range(source.num_blocks)]


def _stored(format: Format, scheme: Scheme, shapes: Mapping[str, Shape], container_bits: int | None) -> Scheme:
    return stored_scheme(scheme, shapes, container_bits=container_bits, groups=format.groups)


def _check(
    format: Format,
    stored: Scheme,
    source: SourceModel | None,
    layouts: Sequence[Layout],
    shapes: Mapping[str, Shape],
    outliers: bool,
) -> None:
    grids: dict[Grid, set[Shape]] = {}
    for name, shape in shapes.items():
        if (grid := stored.grid_of(name)) is not None:
            grids.setdefault(grid, set()).add(shape)
    format.codec(stored).check(layouts, grids, outliers)
    if source is not None:
        format.container.check_source(source)
