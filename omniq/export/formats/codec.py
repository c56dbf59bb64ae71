# SPDX-License-Identifier: Apache-2.0
"""What a codec is: it turns codes, scales and zero points of one linear into the tensors of a checkpoint, and back.

A codec rearranges bits and never rounds. It is made for a scheme, because a file may hold activations in another layout
than weights alone. How the tensors of many linears become a model on disk is the task of a container
(``omniq.export.containers.container``).
"""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

from torch import Tensor

from omniq.errors import UserError
from omniq.grid.affine import Grid
from omniq.grid.dtypes import SCALE_DTYPES, dtype_name
from omniq.grid.scheme import Scheme
from omniq.models.layout import Layout
from omniq.storage.block_result import QuantizedLinear


@dataclass(frozen=True)
class WrittenLinear:
    """What a container remembers of a quantized linear after it has written the tensors.

    Args:
        grid: of its codes.
        weights: how many there are.
        bits_per_weight: bits of codes, scales, zero points and outliers over the number of weights.
        outliers: how many are kept in float16; None if there is no sparse part.
    """

    grid: Grid
    weights: int
    bits_per_weight: float
    outliers: int | None

    @classmethod
    def of(cls, linear: QuantizedLinear) -> "WrittenLinear":
        """Count the parts of a linear."""
        outliers = None if linear.outliers is None else linear.outliers.value.numel()
        return cls(linear.grid, linear.codes.numel(), linear.bits_per_weight(), outliers)


class Codec(Protocol):
    """The layout of one linear, made for a scheme.

    Attributes:
        requires: packages that the runtime needs beside transformers, as requirements of pip.
    """

    @property
    def requires(self) -> tuple[str, ...]: ...

    def check(self, layouts: Sequence[Layout] = (), grids: Collection[Grid] = (), outliers: bool = False) -> None:
        """Refuse a scheme that the codec, or the runtime that reads it, does not support; called before any long work.

        Args:
            layouts: of the blocks, if the model is known already.
            grids: of all quantized linears, if they are known already.
            outliers: whether linears have a sparse part beside the codes.

        Raises:
            UserError: names the scheme, and a format or setting that fits.
        """

    def check_linear(self, name: str, linear: QuantizedLinear) -> None:
        """Refuse a linear whose values the codec cannot store.

        Raises:
            UserError: another format can store it.
            ValueError: the linear does not agree with its own grid or with the scheme.
        """

    def bits(self, grid: Grid) -> int:
        """Bits that a code of this grid takes on disk."""

    def store(self, name: str, linear: QuantizedLinear) -> dict[str, Tensor]:
        """The tensors of one linear by full name.

        Args:
            name: full name of the linear, such as ``model.layers.7.mlp.up_proj``.
            linear: as ``check_linear`` accepts it.
        """

    def load(self, name: str, tensors: Mapping[str, Tensor], grid: Grid) -> QuantizedLinear:
        """Invert ``store``.

        Args:
            tensors: by full name; tensors of other linears are ignored.
            grid: of this linear.

        Raises:
            KeyError: a tensor of this linear is missing.
            ValueError: a tensor has an impossible shape, dtype or padding.
        """


def check_scheme(scheme: Scheme, format: str, problem: str = "") -> None:
    """Refuse a scheme for the problem that a format has with it, or for scales in a dtype that no format stores.

    Args:
        format: its name.
        problem: what it cannot do, and what would fit; empty if it has no problem.

    Raises:
        UserError: the format has a problem with the scheme.
    """
    if not problem and dtype_name(scheme.export_dtype) not in SCALE_DTYPES:
        problem = f"cannot hold scales in {scheme.export_dtype}: use float16, bfloat16 or float32"
    if problem:
        raise UserError(f"scheme {scheme.name}: export.format {format} {problem}")


def check_middle(name: str, linear: QuantizedLinear) -> None:
    """Refuse a linear on a symmetric grid whose zero points are not all in the middle of the code range.

    Raises:
        ValueError: names the linear and the expected zero point.
    """
    middle = 2 ** (linear.grid.bits - 1)
    if linear.grid.symmetric and bool((linear.zero_point != middle).any()):
        raise ValueError(f"{name}: the zero point of a symmetric grid is not {middle}")


def stored_under(name: str, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors of one linear by their last name."""
    prefix = f"{name}."
    return {key.removeprefix(prefix): tensor for key, tensor in tensors.items() if key.startswith(prefix)}
