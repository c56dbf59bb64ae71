# SPDX-License-Identifier: Apache-2.0
"""The scheme: bits of everything in a quantized model, by their name in the field.

    W4A16        weights of 4 bits, one scale for each output channel
    W3A16g128    groups of 128 inputs
    W6A6         the inputs of every linear in 6 bits as well, each token on its own range
    W4A4KV4      keys and values too, each token of each head on its own range, after rotary embedding

With ``activation_range: tensor`` all tokens share one range, which is found in the calibration text once the block is
finished, and fixed. The field calls this static, and a range for each token dynamic.

Rules give some linears other weights, or leave them in floating point: ``omniq.grid.rule``.

The same object is what a user writes in YAML, what the blocks are calibrated under, and what an export tells a runtime.

OmniQuant's tables quantize queries, keys and values to the activations' bits whenever these are below 16, while their
names do not say so. omniq says it: the paper's W4A4 is ``name: W4A4KV4, queries: true``. The softmax output stays at 16
bits, as in the paper.

This module imports torch only where a grid or a dtype is asked for, so that a configuration is checked without it.
"""

from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Literal

from omniq.errors import UserError
from omniq.grid.name import SchemeName, check_weights, parse_scheme
from omniq.grid.rule import Rule

if TYPE_CHECKING:  # a configuration is parsed and checked without torch
    import torch

    from omniq.grid.affine import Grid


@dataclass(frozen=True)
class Activations:
    """What becomes of activations while a block computes; 16 bits mean that nothing does.

    Args:
        inputs: bits of the inputs of quantized linears.
        queries: bits of queries, as they enter the attention product.
        keys_values: bits of keys and values.
        symmetric: no zero points.
        static: one fixed range for the inputs of a linear; else each token has its own. Queries, keys and values
            always have one a token.
    """

    inputs: int = 16
    queries: int = 16
    keys_values: int = 16
    symmetric: bool = False
    static: bool = False

    @property
    def attention(self) -> bool:
        """Whether queries, keys or values are quantized."""
        return self.queries != 16 or self.keys_values != 16

    @property
    def quantized(self) -> bool:
        """Whether anything is."""
        return self.inputs != 16 or self.attention


@dataclass(frozen=True)
class Scheme:
    """What the deployed model looks like.

    Args:
        name: as the field writes it: ``W4A16`` per-channel, ``W3A16g128`` with groups of 128, ``W4A4``, ``W4A4KV4``.
        symmetric: zero points of weights fixed in the middle of the code range.
        dtype: of scales and of everything that is not quantized, as deployed.
        activation_symmetric: activations without zero points, which the integer kernels of the field prefer; the
            paper has them.
        activation_range: what shares a range in the inputs of linears: each ``token``, found as it comes (the paper),
            or the whole ``tensor``, found in the calibration text and fixed.
        queries: quantize queries to the bits of the linears' inputs, as the paper does.
        rules: other weights for some linears; the last rule that matches a linear decides.

    Raises:
        UserError: a name that is not understood, bits that are not 2 to 8 or 16, a group size that is not usable,
            a setting of activations where the name has none, or a rule with other activations.
    """

    name: str = "W4A16"
    symmetric: bool = False
    dtype: Literal["float16", "bfloat16", "float32"] = "float16"
    activation_symmetric: bool = False
    activation_range: Literal["token", "tensor"] = "token"
    queries: bool = False
    rules: tuple[Rule, ...] = ()

    def __post_init__(self) -> None:
        weight_bits, inputs, keys_values, group_size = self._parsed
        for what, bits in (("activations", inputs), ("keys and values", keys_values)):
            if not 2 <= bits <= 8 and bits != 16:
                raise UserError(f"scheme.name {self.name!r}: {what} of {bits} bits are not possible: use 2 to 8, or 16")
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
        for rule in self.rules:
            rule.check_activations(self.name, inputs, keys_values)

    def rule_of(self, name: str) -> Rule | None:
        """The rule that decides about a linear, by its full name: the last that matches it; None if none matches."""
        return next((rule for rule in reversed(self.rules) if rule.matches(name)), None)

    def grid_of(self, name: str) -> "Grid | None":
        """The grid of a linear, by its full name such as ``model.layers.0.mlp.up_proj``; None: floating point."""
        rule = self.rule_of(name)
        return self.grid if rule is None else self._grids[rule]

    @cached_property
    def grid(self) -> "Grid":
        """The grid of the weights that no rule matches."""
        from omniq.grid.affine import Grid

        return Grid(self._parsed.bits, self._parsed.group_size, self.symmetric, self.export_dtype)

    @property
    def grids(self) -> tuple["Grid", ...]:
        """Every grid that the name and the rules give, each once."""
        return tuple(dict.fromkeys(grid for grid in (self.grid, *self._grids.values()) if grid is not None))

    @cached_property
    def _grids(self) -> "dict[Rule, Grid | None]":
        from omniq.grid.affine import Grid

        found: dict[Rule, Grid | None] = {}
        for rule in self.rules:
            symmetric = self.symmetric if rule.symmetric is None else rule.symmetric
            weights = rule.weights
            found[rule] = weights and Grid(weights.bits, weights.group_size, symmetric, self.export_dtype)
        return found

    @cached_property
    def _parsed(self) -> SchemeName:
        return parse_scheme(self.name)

    @property
    def activation_bits(self) -> int:
        """Bits of the linears' inputs; 16 for none."""
        return self._parsed.activation_bits

    @property
    def kv_bits(self) -> int:
        """Bits of keys and values; 16 for none."""
        return self._parsed.kv_bits

    @property
    def activations(self) -> Activations:
        """What becomes of activations while a block computes."""
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
