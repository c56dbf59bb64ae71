# SPDX-License-Identifier: Apache-2.0
"""The protocol of codecs: convert codes, scales and zero points of one linear to tensors of a checkpoint, and back.

A codec rearranges bits and never rounds. It is created for a scheme, because a file with quantized activations may have
another layout than one with only quantized weights. A container writes the tensors of all linears to disk
(``omniq.export.containers.container``).
"""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from math import prod
from typing import Protocol

from torch import Tensor

from omniq.errors import UserError
from omniq.grid.affine import Grid
from omniq.grid.dtypes import SCALE_DTYPES, dtype_name
from omniq.grid.scheme import Scheme
from omniq.models.layout import Layout
from omniq.models.propose import pattern
from omniq.storage.block_result import QuantizedLinear

Shape = tuple[int, int]
"""Outputs and inputs of a linear."""

NO_GRIDS: Mapping[Grid, Collection[Shape]] = {}


@dataclass(frozen=True)
class WrittenLinear:
    """Facts about a quantized linear that a container keeps after it has written the tensors.

    Args:
        grid: the grid of its codes.
        shape: outputs and inputs.
        bits_per_weight: bits of codes, scales, zero points and outliers, divided by the number of weights.
        outliers: number of weights kept in float16; None without a sparse part.
    """

    grid: Grid
    shape: Shape
    bits_per_weight: float
    outliers: int | None

    @classmethod
    def of(cls, linear: QuantizedLinear) -> "WrittenLinear":
        """Collect the facts about a linear."""
        outliers = None if linear.outliers is None else linear.outliers.value.numel()
        outputs, inputs = linear.codes.shape
        return cls(linear.grid, (outputs, inputs), linear.bits_per_weight(), outliers)

    @property
    def weights(self) -> int:
        """Number of weights."""
        return prod(self.shape)


class Codec(Protocol):
    """The layout of one linear, made for a scheme.

    Attributes:
        requires: packages that the runtime needs beside transformers, in pip's notation.
    """

    @property
    def requires(self) -> tuple[str, ...]: ...

    def check(
        self,
        layouts: Sequence[Layout] = (),
        grids: Mapping[Grid, Collection[Shape]] = NO_GRIDS,
        outliers: bool = False,
    ) -> None:
        """Refuse a scheme that the codec or its runtime does not support; called before any long work.

        Args:
            layouts: the layouts of the blocks, if the model is already known.
            grids: the stored grids of all quantized linears with the shapes of these, if they are already known.
            outliers: True if linears have a sparse part beside the codes.

        Raises:
            UserError: names the scheme, and a supported format or setting.
        """

    def check_linear(self, name: str, linear: QuantizedLinear) -> None:
        """Refuse a linear whose values the codec cannot store.

        Raises:
            UserError: another format can store it.
            ValueError: the linear contradicts its own grid or the scheme.
        """

    def bits(self, grid: Grid) -> int:
        """Bits of a code of this grid on disk."""

    def store(self, name: str, linear: QuantizedLinear) -> dict[str, Tensor]:
        """Convert one linear to tensors by full name.

        Args:
            name: full name of the linear, such as ``model.layers.7.mlp.up_proj``.
            linear: a linear that ``check_linear`` accepts.
        """

    def load(self, name: str, tensors: Mapping[str, Tensor], grid: Grid) -> QuantizedLinear:
        """Invert ``store``.

        Args:
            name: full name of the linear.
            tensors: the tensors by full name; tensors of other linears are ignored.
            grid: the grid of this linear.

        Raises:
            KeyError: a tensor of this linear is missing.
            ValueError: a tensor has an impossible shape, dtype or padding.
        """


def check_scheme(scheme: Scheme, format: str, problem: str = "") -> None:
    """Refuse a scheme that a format does not support, or whose scales have a dtype that no format stores.

    Args:
        scheme: the scheme.
        format: name of the format.
        problem: the missing support and the remedy, as the end of a sentence; empty if the format supports the scheme.

    Raises:
        UserError: the format does not support the scheme.
    """
    if not problem and dtype_name(scheme.export_dtype) not in SCALE_DTYPES:
        problem = f"cannot hold scales in {scheme.export_dtype}: use float16, bfloat16 or float32"
    if problem:
        raise UserError(f"scheme {scheme.name}: export.format {format} {problem}")


def check_middle(name: str, linear: QuantizedLinear) -> None:
    """Refuse a linear on a symmetric grid with a zero point that is not in the middle of the code range.

    Raises:
        ValueError: names the linear and the expected zero point.
    """
    middle = 2 ** (linear.grid.bits - 1)
    if linear.grid.symmetric and bool((linear.zero_point != middle).any()):
        raise ValueError(f"{name}: the zero point of a symmetric grid is not {middle}")


def is_of_expert(name: str) -> bool:
    """True for a linear of an expert, whose weights transformers merges into one parameter."""
    return pattern(name) != name


def stored_under(name: str, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Select the tensors of one linear, by the last part of their names."""
    prefix = f"{name}."
    return {key.removeprefix(prefix): tensor for key, tensor in tensors.items() if key.startswith(prefix)}
