# SPDX-License-Identifier: Apache-2.0
"""The scheme: the bits of all quantized tensors of a model, in the usual notation.

    W4A16        weights of 4 bits, one scale per output channel
    W3A16g128    weights of 3 bits, in groups of 128 inputs
    W6A6         also the inputs of every linear in 6 bits, with a range for each token
    W4A4KV4      also keys and values, with a range for each token of each head, after rotary embedding

With ``activation_range: tensor``, all tokens share one fixed range, which is measured on the calibration text when the
block is finished. This is commonly called static quantization, and a range for each token dynamic quantization.

Rules give some linears other weight settings, or leave them in floating point: ``omniq.grid.rule``.

Users write this object in YAML; calibration and export use the same object.

OmniQuant's tables quantize queries, keys and values to the bits of the activations whenever these are below 16, but
their names do not show it. In omniq the setting is explicit: the paper's W4A4 is ``name: W4A4KV4, queries: true``. The
softmax output stays at 16 bits, as in the paper.

This module imports torch only when a grid or a dtype is requested, so that a configuration can be checked without it.
"""

from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any, Literal

from omniq.errors import UserError
from omniq.grid.name import ScaleBits, SchemeName, ZeroPoints, check_weights, parse_scheme
from omniq.grid.rule import Rule

if TYPE_CHECKING:  # a configuration is parsed and checked without torch
    import torch

    from omniq.grid.affine import Grid


@dataclass(frozen=True)
class Activations:
    """How a block quantizes activations while it computes; 16 bits mean no quantization.

    Args:
        inputs: bits of the inputs of quantized linears.
        queries: bits of queries, as they enter the attention product.
        keys_values: bits of keys and values.
        symmetric: quantize without zero points.
        static: use one fixed range for all inputs of a linear instead of a range for each token. Queries, keys and
            values always have a range for each token.
    """

    inputs: int = 16
    queries: int = 16
    keys_values: int = 16
    symmetric: bool = False
    static: bool = False

    @property
    def attention(self) -> bool:
        """True if queries, keys or values are quantized."""
        return self.queries != 16 or self.keys_values != 16

    @property
    def quantized(self) -> bool:
        """True if any activation is quantized."""
        return self.inputs != 16 or self.attention


@dataclass(frozen=True)
class Scheme:
    """The number formats of the exported model.

    Args:
        name: bits in the usual notation: ``W4A16`` per-channel, ``W3A16g128`` with groups of 128, ``W4A4``,
            ``W4A4KV4``.
        symmetric: fix the zero points of weights in the middle of the code range.
        dtype: dtype of scales and of all exported parameters that are not quantized.
        activation_symmetric: quantize activations without zero points, which common integer kernels prefer. The paper
            uses zero points.
        activation_range: ``token`` computes a range for each token at run time, as in the paper. ``tensor`` fixes one
            range for all inputs of a linear after calibration.
        queries: quantize queries to the bits of the linears' inputs, as the paper does.
        zero_points: the zero points of asymmetric weights: ``any``; ``nonzero`` for formats that cannot hold 0
            (version 1 of ``gptq``); or ``inner``, which also excludes the largest code (``gguf`` in 2 bits).
        scale_bits: significant bits of the scales of weights: 8 for scales that are exact in float16 and in bfloat16.
            By default a scale has all bits of its dtype.
        rules: other weight settings for some linears; the last rule that matches a linear applies.

    Raises:
        UserError: the name is not valid, bits are not 2 to 8 or 16, the group size is not valid, a setting concerns
            activations that the name does not quantize, or a rule has other activations.
    """

    name: str = "W4A16"
    symmetric: bool = False
    dtype: Literal["float16", "bfloat16", "float32"] = "float16"
    activation_symmetric: bool = False
    activation_range: Literal["token", "tensor"] = "token"
    queries: bool = False
    rules: tuple[Rule, ...] = ()
    zero_points: ZeroPoints = "any"
    scale_bits: ScaleBits | None = None

    def __post_init__(self) -> None:
        weight_bits, inputs, keys_values, group_size = self.parsed
        for what, bits in (("activations", inputs), ("keys and values", keys_values)):
            if not 2 <= bits <= 8 and bits != 16:
                raise UserError(f"scheme.name {self.name!r}: {what} of {bits} bits are not valid: use 2 to 8, or 16")
        if self.activation_symmetric and inputs == keys_values == 16:
            raise UserError(
                f"scheme.activation_symmetric: {self.name!r} quantizes no activations; use a name such as W4A8"
            )
        if self.activation_range == "tensor" and inputs == 16:
            raise UserError(
                f"scheme.activation_range: {self.name!r} quantizes no inputs of linears; use a name such as W8A8"
            )
        if self.queries and inputs == 16:
            raise UserError(
                f"scheme.queries: {self.name!r} has no activation bits to give to queries; use a name such as W4A4KV4"
            )
        check_weights(weight_bits, group_size)
        if self.zero_points != "any" and self.symmetric and all(rule.symmetric is not False for rule in self.rules):
            raise UserError(
                f"scheme.zero_points {self.zero_points}: the zero points of symmetric weights are fixed: remove the "
                "setting, or set scheme.symmetric to false"
            )
        for rule in self.rules:
            rule.check_activations(self.name, inputs, keys_values)

    def rule_of(self, name: str) -> Rule | None:
        """The rule for a linear, given by its full name: the last rule that matches; None if no rule matches."""
        return next((rule for rule in reversed(self.rules) if rule.matches(name)), None)

    def grid_of(self, name: str) -> "Grid | None":
        """The grid of a linear, given by its full name; None if the linear stays in floating point."""
        rule = self.rule_of(name)
        return self.grid if rule is None else self._grids[rule]

    @cached_property
    def grid(self) -> "Grid":
        """The grid of linears that no rule matches."""
        from omniq.grid.affine import Grid

        return Grid(self.parsed.bits, self.parsed.group_size, self.symmetric, **self._common)

    @property
    def grids(self) -> tuple["Grid", ...]:
        """The distinct grids of the name and the rules."""
        return tuple(dict.fromkeys(grid for grid in (self.grid, *self._grids.values()) if grid is not None))

    @cached_property
    def _grids(self) -> "dict[Rule, Grid | None]":
        from omniq.grid.affine import Grid

        found: dict[Rule, Grid | None] = {}
        for rule in self.rules:
            symmetric = self.symmetric if rule.symmetric is None else rule.symmetric
            weights = rule.weights
            found[rule] = weights and Grid(weights.bits, weights.group_size, symmetric, **self._common)
        return found

    @property
    def _common(self) -> dict[str, Any]:
        """The fields that all grids share."""
        return {"scale_dtype": self.export_dtype, "zero_points": self.zero_points, "scale_bits": self.scale_bits}

    @cached_property
    def parsed(self) -> SchemeName:
        """The parts of the name."""
        return parse_scheme(self.name)

    @property
    def activation_bits(self) -> int:
        """Bits of the linears' inputs; 16 if they are not quantized."""
        return self.parsed.activation_bits

    @property
    def kv_bits(self) -> int:
        """Bits of keys and values; 16 if they are not quantized."""
        return self.parsed.kv_bits

    @property
    def activations(self) -> Activations:
        """How a block quantizes activations while it computes."""
        queries = self.activation_bits if self.queries else 16
        static = self.activation_range == "tensor"
        return Activations(self.activation_bits, queries, self.kv_bits, self.activation_symmetric, static)

    @property
    def export_dtype(self) -> "torch.dtype":
        """Dtype of scales, norms, biases and embeddings in the checkpoint."""
        from omniq.grid.dtypes import torch_dtype

        return torch_dtype(self.dtype)

    def __str__(self) -> str:
        return "; ".join([self.name, *map(str, self.rules)])
