# SPDX-License-Identifier: Apache-2.0
"""omniq's own format: for what no runtime's format holds, and for everything else that quantizes weights.

Stored of each quantized linear, ``u = 2^(b-1)``:

    weight_packed        int32 [o, ceil(i b / 32)]   q, a dense bitstream along the inputs
    weight_scale         [o, G]                      s, in the dtype of deployment
    weight_zero_point    int32 [ceil(o b / 32), G]   z, a dense bitstream along the outputs; asymmetric only, else z = u
    weight_shape         int64 [2]                   o, i
    outlier_row_pointer  int32 [o + 1]               row r owns the entries row_pointer[r] : row_pointer[r + 1]
    outlier_column       int16 or int32 [n]          of each entry
    outlier_value        float16 [n]                 added to (q - z) s

The first four are those of compressed-tensors' ``pack-quantized`` (``omniq.export.compressed_tensors``); the outliers
are there only if the linear has a sparse part. Each linear has its own grid, in ``config.json``:

    "quantization_config": {
      "quant_method": "omniq", "version": 1, "scale_dtype": "float16",
      "linears": {"model.layers.0.mlp.up_proj": {"bits": 3, "group_size": -1, "symmetric": false, "outliers": 983}, …}}

so bits and group sizes may differ from linear to linear, and those that are not named are plain. The reader is
``omniq.runtime``; after ``import omniq`` plain ``from_pretrained`` finds it.

Shapes: ``o`` output features, ``i`` input features, ``G`` groups of a row, ``b`` bits, ``n`` outliers.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from omniq.errors import UserError
from omniq.export.compressed_tensors import PackQuantized
from omniq.export.format import Written
from omniq.export.packing import words
from omniq.models.family import Family
from omniq.quantizers.grid import Grid
from omniq.quantizers.scheme import Scheme
from omniq.result import Outliers, QuantizedLinear

_SPARSE = "outlier_"  # before the fields of Outliers
_SCALE_DTYPES = (torch.float16, torch.bfloat16, torch.float32)


def pack_linear(linear: QuantizedLinear) -> dict[str, Tensor]:
    """The tensors of one linear by their last name."""
    sparse = {} if linear.outliers is None else vars(linear.outliers)
    return PackQuantized().store(linear) | {f"{_SPARSE}{key}": value for key, value in sparse.items()}


def unpack_linear(stored: Mapping[str, Tensor], grid: Grid) -> QuantizedLinear:
    """Invert ``pack_linear``; works on any device.

    Raises:
        KeyError: a tensor is missing.
        ValueError: one has a shape or dtype it cannot have.
    """
    dense = PackQuantized().load(stored, grid)
    if not any(key.startswith(_SPARSE) for key in stored):
        return dense
    fields = ("row_pointer", "column", "value")
    sparse = Outliers(**{key: stored[f"{_SPARSE}{key}"] for key in fields})
    return QuantizedLinear(grid, dense.codes, dense.scale, dense.zero_point, sparse)


def packed_shapes(
    grid: Grid, outputs: int, inputs: int, outliers: int | None
) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
    """Shape and dtype of the tensors of one linear by their last name, known before any is read.

    Args:
        outliers: entries of the sparse part; None if there is none.
    """
    groups = grid.groups(inputs)
    shapes: dict[str, tuple[tuple[int, ...], torch.dtype]] = {
        "weight_packed": ((outputs, words(inputs, grid.bits)), torch.int32),
        "weight_scale": ((outputs, groups), grid.scale_dtype),
        "weight_shape": ((2,), torch.int64),
    }
    if not grid.symmetric:
        shapes["weight_zero_point"] = ((words(outputs, grid.bits), groups), torch.int32)
    if outliers is not None:
        shapes[f"{_SPARSE}row_pointer"] = ((outputs + 1,), torch.int32)
        shapes[f"{_SPARSE}column"] = ((outliers,), torch.int32)  # or int16: integers are taken as they are stored
        shapes[f"{_SPARSE}value"] = ((outliers,), torch.float16)
    return shapes


class Native:
    """Packed codes, one grid a linear, and sparse outliers."""

    name = "omniq"
    requires: tuple[str, ...] = ("omniq",)

    def check(self, scheme: Scheme, family: Family | None = None, outliers: bool = False) -> None:
        """Refuse quantized activations and odd dtypes.

        Raises:
            UserError: names the scheme and what would fit.
        """
        problem = ""
        if scheme.activations.quantized:
            problem = "holds quantized weights only: use A16 without KV bits and with queries false"
        elif scheme.grid.scale_dtype not in _SCALE_DTYPES:
            problem = f"cannot hold scales in {scheme.grid.scale_dtype}: use float16, bfloat16 or float32"
        if problem:
            raise UserError(f"scheme {scheme.name}: format {self.name} {problem}")

    def tensors(self, name: str, linear: QuantizedLinear, scheme: Scheme) -> dict[str, Tensor]:
        """What is stored for one linear, by full name.

        Raises:
            UserError: its scales have another dtype than the model.
            ValueError: a symmetric linear whose zero point is not the middle of the code range.
        """
        grid, dtype = linear.grid, scheme.grid.scale_dtype
        if grid.scale_dtype != dtype:
            raise UserError(
                f"{name} has scales in {grid.scale_dtype}, the model in {dtype}: format {self.name} holds one"
            )
        middle = 2 ** (grid.bits - 1)
        if grid.symmetric and bool((linear.zero_point != middle).any()):
            raise ValueError(f"{name}: the zero point of a symmetric grid is not {middle}")
        return {f"{name}.{key}": tensor for key, tensor in pack_linear(linear).items()}

    def read(self, name: str, tensors: Mapping[str, Tensor], scheme: Scheme) -> QuantizedLinear:
        """Invert ``tensors``."""
        prefix = f"{name}."
        stored = {key.removeprefix(prefix): tensor for key, tensor in tensors.items() if key.startswith(prefix)}
        return unpack_linear(stored, scheme.grid)

    def quantization_config(
        self, scheme: Scheme, ignore: Sequence[str], linears: Mapping[str, Written]
    ) -> dict[str, Any]:
        """The entry of ``config.json``; linears that it does not name are plain, so ``ignore`` needs no mention."""
        return {
            "quant_method": self.name,
            "version": 1,
            "scale_dtype": str(scheme.grid.scale_dtype).removeprefix("torch."),
            "linears": {name: _entry(linear) for name, linear in linears.items()},
        }


def _entry(linear: Written) -> dict[str, Any]:
    grid = linear.grid
    entry = {"bits": grid.bits, "group_size": grid.group_size, "symmetric": grid.symmetric}
    return entry if linear.outliers is None else entry | {"outliers": linear.outliers}
