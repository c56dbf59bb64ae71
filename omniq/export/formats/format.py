# SPDX-License-Identifier: Apache-2.0
"""What a format is: the place on disk where codes, scales and zero points go, and the way back.

A format rearranges bits and never rounds. It is one object in one file beside this one, and an entry in
``omniq.export.FORMATS``. Its methods get the scheme, so that a format may keep several layouts (packed words for
weight-only models, bytes for models with integer activations) behind one name.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from omniq.errors import UserError
from omniq.grid.affine import Grid
from omniq.grid.scheme import Scheme
from omniq.models.layout import Layout
from omniq.storage.block_result import BlockResult, QuantizedLinear

_SCALE_DTYPES = (torch.float16, torch.bfloat16, torch.float32)  # what transformers runs models in


def check_scheme(scheme: Scheme, format: str, problem: str = "") -> None:
    """Refuse a scheme for the problem that a format has with it, or for scales in a dtype that no format holds.

    Args:
        format: its name.
        problem: what it cannot do, and what would fit; empty if there is nothing.

    Raises:
        UserError: there is a problem.
    """
    if not problem and scheme.grid.scale_dtype not in _SCALE_DTYPES:
        problem = f"cannot hold scales in {scheme.grid.scale_dtype}: use float16, bfloat16 or float32"
    if problem:
        raise UserError(f"scheme {scheme.name}: export.format {format} {problem}")


def scheme_of(result: BlockResult) -> Scheme:
    """The weight-only scheme of a finished block.

    Raises:
        UserError: nothing is quantized in it.
    """
    if not result.linears:
        raise UserError("the first block has no quantized linear to tell the scheme by: give the scheme")
    return Scheme.of(next(iter(result.linears.values())).grid)


@dataclass(frozen=True)
class Written:
    """What is remembered of a quantized linear once its tensors are written.

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
    def of(cls, linear: QuantizedLinear) -> "Written":
        """Look at it."""
        outliers = None if linear.outliers is None else linear.outliers.value.numel()
        return cls(linear.grid, linear.codes.numel(), linear.bits_per_weight(), outliers)


class Format(Protocol):
    """One way to lay a quantized model out on disk."""

    name: str
    requires: tuple[str, ...]  # requirements of a reader beside transformers
    stays_packed: bool  # whether transformers keeps the weights as they are stored

    def check(self, scheme: Scheme, layouts: Sequence[Layout] = (), outliers: bool = False) -> None:
        """Refuse what the format, or what reads it, cannot do; called before any long work.

        Args:
            layouts: of the blocks, if the model is known already.
            outliers: whether linears have a sparse part beside the codes.

        Raises:
            UserError: names the scheme and what would fit.
        """

    def code_bits(self, grid: Grid, scheme: Scheme) -> int:
        """Bits that a code on this grid takes on disk."""

    def tensors(self, name: str, linear: QuantizedLinear, scheme: Scheme) -> dict[str, Tensor]:
        """What is stored for one linear, by full name.

        Args:
            name: full name of the linear, such as ``model.layers.7.mlp.up_proj``.
        """

    def read(self, name: str, tensors: Mapping[str, Tensor], scheme: Scheme) -> QuantizedLinear:
        """Invert ``tensors``.

        Args:
            scheme: as for ``tensors``, with the grid of this linear.

        Raises:
            KeyError: a tensor of this linear is missing.
            ValueError: one has a shape, dtype or padding it cannot have.
        """

    def quantization_config(
        self, scheme: Scheme, ignore: Sequence[str], linears: Mapping[str, Written]
    ) -> dict[str, Any]:
        """The entry of ``config.json`` that tells a runtime how to read the tensors.

        Args:
            ignore: full names of the linears that are not quantized.
            linears: those that are, by full name.
        """
