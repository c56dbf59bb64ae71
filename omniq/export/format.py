# SPDX-License-Identifier: Apache-2.0
"""What a format is: the place on disk where codes, scales and zero points go, and the way back.

A format rearranges bits and never rounds. It is one object in one file beside this one, and an entry in
``omniq.export.FORMATS``. Its methods get the scheme, so that a format may keep several layouts (packed words for
weight-only models, bytes for models with integer activations) behind one name.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from torch import Tensor

from omniq.quantizers.grid import Grid
from omniq.result import BlockResult, QuantizedLinear


@dataclass(frozen=True)
class Scheme:
    """What a quantized model asks of a runtime.

    Args:
        grid: of every quantized linear; its ``scale_dtype`` is also the dtype the model is deployed in.
        activation_bits: integer bits of the linears' inputs, quantized anew for every token; 16 for none.
        activation_symmetric: whether those inputs have a zero point of zero.
        kv_bits: integer bits of the KV cache; 16 for none.
        outliers: whether linears have a sparse part beside the codes.
    """

    grid: Grid
    activation_bits: int = 16
    activation_symmetric: bool = True
    kv_bits: int = 16
    outliers: bool = False

    @property
    def name(self) -> str:
        """By its name in the field: ``W3A16g64``, ``W4A4KV8``."""
        cache = "" if self.kv_bits == 16 else f"KV{self.kv_bits}"
        group = "" if self.grid.group_size == -1 else f"g{self.grid.group_size}"
        return f"W{self.grid.bits}A{self.activation_bits}{cache}{group}"

    @classmethod
    def of(cls, result: BlockResult) -> "Scheme":
        """The weight-only scheme of a finished block."""
        linears = result.linears.values()
        return cls(next(iter(linears)).grid, outliers=any(linear.outliers is not None for linear in linears))


class Format(Protocol):
    """One way to lay a quantized model out on disk."""

    name: str
    requires: tuple[str, ...]  # packages that a reader needs beside transformers

    def check(self, scheme: Scheme) -> None:
        """Refuse what the format, or what reads it, cannot do; called before any long work.

        Raises:
            UserError: names the scheme and what would fit.
        """

    def tensors(self, name: str, linear: QuantizedLinear, scheme: Scheme) -> dict[str, Tensor]:
        """What is stored for one linear, by full name.

        Args:
            name: full name of the linear, such as ``model.layers.7.mlp.up_proj``.
        """

    def read(self, name: str, tensors: Mapping[str, Tensor], scheme: Scheme) -> QuantizedLinear:
        """Invert ``tensors``.

        Raises:
            KeyError: a tensor of this linear is missing.
            ValueError: one has a shape, dtype or padding it cannot have.
        """

    def quantization_config(self, scheme: Scheme, ignore: Sequence[str]) -> dict[str, Any]:
        """The entry of ``config.json`` that tells a runtime how to read the tensors.

        Args:
            ignore: full names of the linears that are not quantized.
        """
