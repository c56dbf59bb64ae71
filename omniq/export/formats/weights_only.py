# SPDX-License-Identifier: Apache-2.0
"""The common part of GPTQ, AWQ and AutoRound: float16 models in which only the weights are integers.

These formats transpose the weight of transformers: rows of a stored matrix belong to inputs, columns to outputs. A
model has one grid, except in AutoRound.

Shapes: ``o`` output features, ``i`` input features, ``G`` groups of a row, ``b`` bits.
"""

from abc import ABC, abstractmethod
from collections.abc import Collection, Mapping, Sequence

import torch
from torch import Tensor

from omniq.errors import UserError
from omniq.export.formats.codec import NO_GRIDS, Shape, check_middle, check_scheme, is_of_expert, stored_under
from omniq.grid.affine import Grid
from omniq.grid.name import CONTAINER_BITS
from omniq.grid.scheme import Scheme
from omniq.models.layout import Layout
from omniq.storage.block_result import QuantizedLinear

_MULTIPLE = 32  # of inputs and of outputs: 32 codes fill whole words for every number of bits


class WeightsOnly(ABC):
    """Implements ``omniq.export.containers.folder_reader.FolderCodec`` but for config and tensors.

    Attributes:
        name: the name that users type.
        widths: the bits of codes that the format holds.
        group_sizes: the group sizes that the readers support; None for every size.
        one_grid: True if all linears of a model must have the same grid.
    """

    name: str
    widths: tuple[int, ...]
    group_sizes: tuple[int, ...] | None = None
    one_grid = True
    stays_packed = True

    def __init__(self, scheme: Scheme) -> None:
        self._scheme = scheme

    @abstractmethod
    def tensors(self, linear: QuantizedLinear) -> dict[str, Tensor]:
        """Convert one linear to tensors by the last part of their names."""

    @abstractmethod
    def linear(self, stored: Mapping[str, Tensor], grid: Grid) -> QuantizedLinear:
        """Invert ``tensors``."""

    def check(
        self,
        layouts: Sequence[Layout] = (),
        grids: Mapping[Grid, Collection[Shape]] = NO_GRIDS,
        outliers: bool = False,
    ) -> None:
        """Refuse whatever the format or its readers do not support.

        Raises:
            UserError: names the scheme and the remedy.
        """
        problems = (self._problem_of_scheme(outliers), self.problem_of_family(layouts), self.problem_of_grids(grids))
        check_scheme(self._scheme, self.name, next(filter(None, problems), ""))

    def problem_of_family(self, layouts: Sequence[Layout]) -> str:
        """The reason why a reader cannot open this family, as the end of a sentence; empty if it can."""
        experts = next((layout for layout in layouts if any(map(is_of_expert, layout.linears))), None)
        return f"does not support the experts of {experts.model_type}: use format omniq" if experts else ""

    def check_linear(self, name: str, linear: QuantizedLinear) -> None:
        """Refuse outliers and quantized scales, and contradictory zero points.

        Raises:
            UserError: the linear has outliers or quantized scales.
            ValueError: the zero point of a symmetric linear is not the middle of the code range.
        """
        for part, what in ((linear.outliers, "outliers"), (linear.grid.second, "quantized scales")):
            if part is not None:
                raise UserError(f"{name} has {what}, which format {self.name} does not support: use format omniq")
        check_middle(name, linear)

    def bits(self, grid: Grid) -> int:
        """Bits of a code on disk."""
        return grid.bits

    def store(self, name: str, linear: QuantizedLinear) -> dict[str, Tensor]:
        """Convert one linear to tensors by full name."""
        return {f"{name}.{key}": tensor for key, tensor in self.tensors(linear).items()}

    def load(self, name: str, tensors: Mapping[str, Tensor], grid: Grid) -> QuantizedLinear:
        """Invert ``store``."""
        return self.linear(stored_under(name, tensors), grid)

    def _problem_of_scheme(self, outliers: bool) -> str:
        scheme = self._scheme
        if outliers:
            return "does not support the sparse outliers or quantized scales of this method: use a method without them"
        if scheme.activations.quantized:
            return "does not support quantized activations: use A16, and no KV"
        if scheme.export_dtype != torch.float16:
            return f"holds scales in float16 only, not in {scheme.dtype}: set scheme.dtype to float16"
        return ""

    def problem_of_grids(self, grids: Mapping[Grid, Collection[Shape]]) -> str:
        """The reason why the format cannot hold these grids, as the end of a sentence; empty if it can."""
        for grid, shapes in grids.items():
            if grid.bits not in self.widths:
                wider = next((bits for bits in CONTAINER_BITS if bits in self.widths and bits > grid.bits), None)
                remedy = f"set export.container_bits to {wider}" if wider else f"use {self.widths[-1]} bits"
                return f"does not support {grid.bits} bits, only {_either(self.widths)}: {remedy}"
            # Per-channel scales arrive here only where no group size divides the inputs, or where they are supported.
            if self.group_sizes is not None and grid.group_size not in (-1, *self.group_sizes):
                sizes = _either(self.group_sizes)
                return f"does not support groups of {grid.group_size}, only of {sizes}: use one of these"
            for outputs, inputs in shapes:
                if outputs % _MULTIPLE or inputs % _MULTIPLE:
                    return (
                        f"does not support a linear of {outputs} outputs and {inputs} inputs, which are not both "
                        f"multiples of {_MULTIPLE}: leave it in floating point by scheme.rules"
                    )
        if self.one_grid and len(grids) > 1:
            return f"does not support {len(grids)} grids in one model: use one grid for all linears"
        return ""


def transposed(linear: QuantizedLinear) -> tuple[Tensor, Tensor, Tensor]:
    """Codes ``[i, o]``, zero points ``[G, o]`` and scales ``[G, o]``."""
    return linear.codes.t().contiguous(), linear.zero_point.t().contiguous(), linear.scale.t().contiguous()


def block_list_of(names: Collection[str]) -> str:
    """The name of the module list that contains all blocks, such as ``model.layers``, from full names of linears."""
    parts = next(iter(names)).split(".")
    return ".".join(parts[: next(index for index, part in enumerate(parts) if part.isdigit())])


def _either(numbers: Sequence[int]) -> str:
    *first, last = map(str, numbers)
    return f"{', '.join(first)} or {last}" if first else last
