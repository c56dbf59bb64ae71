# SPDX-License-Identifier: Apache-2.0
"""omniq's own format, which supports every grid, outliers, quantized scales, and quantized queries, keys and values.

Stored tensors of each quantized linear, with ``u = 2^(b-1)``:

    weight_packed        int32 [o, ceil(i b / 32)]   q, a dense bitstream along the inputs
    weight_scale         [o, G]                      s, in the export dtype
    weight_zero_point    int32 [ceil(o b / 32), G]   z, a dense bitstream along the outputs; asymmetric only, else z = u
    weight_shape         int64 [2]                   o, i
    outlier_row_pointer  int32 [o + 1]               row r owns the entries row_pointer[r] : row_pointer[r + 1]
    outlier_column       int16 or int32 [n]          column of each entry
    outlier_value        float16 [n]                 added to (q - z) s

The first four are those of ``pack-quantized`` in compressed-tensors (``omniq.export.formats.compressed_tensors``). The
outlier tensors exist only if the linear has a sparse part. If scales are stored as codes over runs of ``r`` rows
(``omniq.grid.quantized_scales``), the first two of the following tensors replace ``weight_scale``. If zero points are
stored as codes, the next two replace ``weight_zero_point``:

    weight_scale_codes       int32 [ceil(o k / 32), G]     codes of k bits, a dense bitstream along the outputs
    weight_scale_ends        [2 R, G]                      smallest of each of the R = ceil(o / r) runs, then largest
    weight_zero_point_codes  int32 [ceil(o k / 32), G]
    weight_zero_point_ends   int32 [ceil(2 R b / 32), G]   also a dense bitstream
    weight_second_level      int64 [3]                     k of scales, k of zero points (0 for no codes), r

``config.json`` records the grid of each linear:

    "quantization_config": {
      "quant_method": "omniq", "version": 1, "scale_dtype": "float16",
      "linears": {"model.layers.0.mlp.up_proj": {"bits": 3, "group_size": -1, "symmetric": false, "outliers": 983}, …}}

Bits and group sizes may differ between linears, and linears without an entry are not quantized. Quantized scales add
the entry ``"second": {"scale_bits": 3, "zero_bits": 0, "rows": 16}``. If the scheme quantizes activations, the entry
``"activations": {"inputs": 4, "queries": 4, "keys_values": 4, "symmetric": false}`` beside ``linears`` gives the bits
of inputs of linears, of queries, and of keys and values, with a range for each token; the reader quantizes them in the
same way. The reader is ``omniq.runtime``; after ``import omniq``, plain ``from_pretrained`` finds it.

Shapes: ``o`` output features, ``i`` input features, ``G`` groups of a row, ``b`` bits, ``n`` outliers.
"""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from omniq.errors import UserError
from omniq.export.formats.codec import NO_GRIDS, Shape, WrittenLinear, check_middle, check_scheme, stored_under
from omniq.export.formats.compressed_tensors import PackQuantized
from omniq.export.formats.packing import pack, unpack, words
from omniq.grid.affine import Grid
from omniq.grid.dtypes import dtype_name
from omniq.grid.quantized_scales import QuantizedScales
from omniq.grid.scheme import Scheme
from omniq.models.families import is_declared
from omniq.models.layout import Layout
from omniq.storage.block_result import Outliers, QuantizedLinear

_NAME = "omniq"  # the name that users type
_SPARSE = "outlier_"  # prefix of the fields of Outliers
_SCALE, _ZERO, _SECOND = "weight_scale", "weight_zero_point", "weight_second_level"


def pack_linear(linear: QuantizedLinear) -> dict[str, Tensor]:
    """Convert one linear to tensors by the last part of their names."""
    sparse = {} if linear.outliers is None else vars(linear.outliers)
    dense = PackQuantized().store(linear)
    if linear.grid.second is not None:
        dense = _encode(dense, linear, linear.grid.second)
    return dense | {f"{_SPARSE}{key}": value for key, value in sparse.items()}


def unpack_linear(stored: Mapping[str, Tensor], grid: Grid) -> QuantizedLinear:
    """Invert ``pack_linear``; works on any device.

    Raises:
        KeyError: a tensor is missing.
        ValueError: a tensor has an impossible shape or dtype.
    """
    dense = PackQuantized().load(stored, grid) if grid.second is None else _decode(stored, grid, grid.second)
    if not any(key.startswith(_SPARSE) for key in stored):
        return dense
    fields = ("row_pointer", "column", "value")
    sparse = Outliers(**{key: stored[f"{_SPARSE}{key}"] for key in fields})
    return QuantizedLinear(dense.grid, dense.codes, dense.scale, dense.zero_point, sparse)


def packed_shapes(
    grid: Grid, outputs: int, inputs: int, outliers: int | None
) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
    """Shape and dtype of the tensors of one linear, by the last part of their names.

    Args:
        grid: the grid of the linear.
        outputs, inputs: numbers of output and input features.
        outliers: number of entries of the sparse part; None without a sparse part.
    """
    groups, second = grid.groups(inputs), grid.second or QuantizedScales(0, 0)
    ends = 2 * second.runs(outputs)
    shapes: dict[str, tuple[tuple[int, ...], torch.dtype]] = {
        "weight_packed": ((outputs, words(inputs, grid.bits)), torch.int32),
        "weight_shape": ((2,), torch.int64),
    }
    if grid.second is not None:
        shapes[_SECOND] = ((3,), torch.int64)
    if second.scale_bits:
        shapes[f"{_SCALE}_codes"] = ((words(outputs, second.scale_bits), groups), torch.int32)
        shapes[f"{_SCALE}_ends"] = ((ends, groups), grid.scale_dtype)
    else:
        shapes[_SCALE] = ((outputs, groups), grid.scale_dtype)
    if second.zero_bits:
        shapes[f"{_ZERO}_codes"] = ((words(outputs, second.zero_bits), groups), torch.int32)
        shapes[f"{_ZERO}_ends"] = ((words(ends, grid.bits), groups), torch.int32)
    elif not grid.symmetric:
        shapes[_ZERO] = ((words(outputs, grid.bits), groups), torch.int32)
    if outliers is not None:
        shapes[f"{_SPARSE}row_pointer"] = ((outputs + 1,), torch.int32)
        shapes[f"{_SPARSE}column"] = ((outliers,), torch.int32)  # or int16: integers keep their stored dtype
        shapes[f"{_SPARSE}value"] = ((outliers,), torch.float16)
    return shapes


def _encode(stored: Mapping[str, Tensor], linear: QuantizedLinear, second: QuantizedScales) -> dict[str, Tensor]:
    """Replace scales and zero points by codes and ends, where the grid stores them as codes."""
    new = {_SECOND: torch.tensor((second.scale_bits, second.zero_bits, second.rows))}
    if second.scale_bits:
        codes, ends = second.encode(linear.scale, second.scale_bits)
        new |= {f"{_SCALE}_codes": pack(codes, second.scale_bits, dim=0), f"{_SCALE}_ends": ends}
    if second.zero_bits:
        codes, ends = second.encode(linear.zero_point, second.zero_bits)
        new[f"{_ZERO}_codes"] = pack(codes, second.zero_bits, dim=0)
        new[f"{_ZERO}_ends"] = pack(ends, linear.grid.bits, dim=0)
    replaced = [key for key in (_SCALE, _ZERO) if f"{key}_codes" in new]
    return {key: tensor for key, tensor in stored.items() if key not in replaced} | new


def _decode(stored: Mapping[str, Tensor], grid: Grid, second: QuantizedScales) -> QuantizedLinear:
    """Invert ``_encode``."""
    inner = dict(stored)
    if second.scale_bits:
        codes = unpack(stored[f"{_SCALE}_codes"], second.scale_bits, int(stored["weight_shape"][0]), dim=0)
        inner[_SCALE] = second.decode(codes, stored[f"{_SCALE}_ends"], second.scale_bits)
    # "symmetric" makes the loader skip the zero points if these are encoded
    found = PackQuantized().load(inner, replace(grid, second=None, symmetric=grid.symmetric or second.zero_bits > 0))
    zero_point = found.zero_point
    if second.zero_bits:
        codes = unpack(stored[f"{_ZERO}_codes"], second.zero_bits, len(zero_point), dim=0)
        ends = unpack(stored[f"{_ZERO}_ends"], grid.bits, 2 * second.runs(len(zero_point)), dim=0)
        zero_point = second.decode(codes, ends, second.zero_bits)
    return QuantizedLinear(grid, found.codes, found.scale, zero_point)


class Omniq:
    """Packed codes, one grid for each linear, scales that may be stored as codes, and sparse outliers."""

    requires: tuple[str, ...] = ("omniq",)
    stays_packed = True

    def __init__(self, scheme: Scheme) -> None:
        self._scheme = scheme

    def check(
        self,
        layouts: Sequence[Layout] = (),
        grids: Mapping[Grid, Collection[Shape]] = NO_GRIDS,
        outliers: bool = False,
    ) -> None:
        """Refuse fixed ranges, quantized attention of undeclared families, and unsupported dtypes of scales.

        Raises:
            UserError: names the scheme and the remedy.
        """
        problem = ""
        if self._scheme.activations.static:
            problem = (
                "does not support fixed ranges: set scheme.activation_range to token, or use format compressed-tensors"
            )
        undeclared = next((layout.model_type for layout in layouts if not is_declared(layout.model_type)), None)
        if self._scheme.activations.attention and undeclared is not None:
            problem = (
                f"does not support quantized queries, keys and values of {undeclared}, a family that omniq does not "
                "declare: use a scheme without KV bits and with queries false"
            )
        check_scheme(self._scheme, _NAME, problem)

    def check_linear(self, name: str, linear: QuantizedLinear) -> None:
        """Refuse scales whose dtype differs from that of the model, and contradictory zero points.

        Raises:
            UserError: the dtype of the scales differs from that of the model.
            ValueError: the zero point of a symmetric linear is not the middle of the code range.
        """
        found, dtype = linear.grid.scale_dtype, self._scheme.export_dtype
        if found != dtype:
            raise UserError(
                f"{name} has scales in {found}, but the model is exported in {dtype}: set scheme.dtype to "
                f"{dtype_name(found)}"
            )
        check_middle(name, linear)

    def bits(self, grid: Grid) -> int:
        """Bits of a code on disk."""
        return grid.bits

    def store(self, name: str, linear: QuantizedLinear) -> dict[str, Tensor]:
        """Convert one linear to tensors by full name."""
        return {f"{name}.{key}": tensor for key, tensor in pack_linear(linear).items()}

    def load(self, name: str, tensors: Mapping[str, Tensor], grid: Grid) -> QuantizedLinear:
        """Invert ``store``."""
        return unpack_linear(stored_under(name, tensors), grid)

    def quantization_config(self, linears: Mapping[str, WrittenLinear], ignore: Sequence[str]) -> dict[str, Any]:
        """The entry of ``config.json``; linears without an entry are not quantized, so ``ignore`` is not written."""
        scheme = self._scheme
        return {
            "quant_method": "omniq",
            "version": 1,
            "scale_dtype": dtype_name(scheme.export_dtype),
            **({"activations": _activations(scheme)} if scheme.activations.quantized else {}),
            "linears": {name: _entry(linear) for name, linear in linears.items()},
        }

    def grid_of(self, name: str, config: Mapping[str, Any], dtype: torch.dtype) -> Grid:
        """Invert ``quantization_config`` for one linear.

        Raises:
            KeyError, TypeError, AttributeError, UserError: omniq does not write such a config.
        """
        return entry_grid(config["linears"][name], dtype)


def entry_grid(entry: Mapping[str, Any], dtype: torch.dtype) -> Grid:
    """The grid of one entry of ``linears``.

    Args:
        entry: the entry of a linear.
        dtype: dtype of the scales.

    Raises:
        KeyError: a field is missing.
        TypeError: a field has a wrong type.
        UserError: the grid is not valid.
    """
    second = entry.get("second")
    if second is not None:
        second = QuantizedScales(second["scale_bits"], second["zero_bits"], second["rows"])
    return Grid(entry["bits"], entry["group_size"], entry["symmetric"], dtype, second)


def _activations(scheme: Scheme) -> dict[str, Any]:
    given = scheme.activations
    return {
        "inputs": given.inputs,
        "queries": given.queries,
        "keys_values": given.keys_values,
        "symmetric": given.symmetric,
    }


def _entry(linear: WrittenLinear) -> dict[str, Any]:
    grid = linear.grid
    entry: dict[str, Any] = {"bits": grid.bits, "group_size": grid.group_size, "symmetric": grid.symmetric}
    if grid.second is not None:
        entry["second"] = dict(vars(grid.second))
    return entry if linear.outliers is None else entry | {"outliers": linear.outliers}
