# SPDX-License-Identifier: Apache-2.0
"""Rules of a scheme: other weight settings for some linears, selected by their full names.

    scheme:
      name: W4A16g128
      rules:
        - {layers: "re:.*down_proj", name: W8A16g128}
        - {layers: "model.layers.0.*", name: none}

The last rule that matches a linear applies to it; if no rule matches, the name of the scheme applies. A rule changes
bits, group size and symmetry of weights. It never changes activations, whose settings hold for the whole scheme.

This module does not import torch, so that a configuration can be checked without it.
"""

import fnmatch
import re
from dataclasses import dataclass
from functools import cached_property

from omniq.errors import UserError
from omniq.grid.name import SchemeName, check_weights, parse_scheme

NONE = "none"  # the name of a rule that leaves linears in floating point
_REGEX = "re:"


@dataclass(frozen=True)
class Rule:
    """Other weight settings for some linears.

    Args:
        layers: full names of the linears, as a glob such as ``model.layers.0.*``, where ``*`` also matches dots; or
            ``re:`` followed by a regular expression for the whole name, such as ``re:.*down_proj``.
        name: bits and group size of the weights, as in ``scheme.name``; ``none`` leaves the linears in floating point.
        symmetric: fix the zero points of weights in the middle of the code range. By default as ``scheme.symmetric``.

    Raises:
        UserError: the pattern or the name is not valid, or no grid has these bits and this group size.
    """

    layers: str
    name: str
    symmetric: bool | None = None

    def __post_init__(self) -> None:
        if not self.layers.removeprefix(_REGEX):
            raise UserError(
                "scheme.rules: layers is empty: give a glob such as model.layers.0.*, or re: and a regular expression"
            )
        try:
            self._pattern  # noqa: B018 (raises if the expression does not compile)
        except re.error as error:
            raise UserError(
                f"scheme.rules: layers {self.layers!r} is not a regular expression ({error}): correct it, or give a "
                "glob such as model.layers.0.*"
            ) from error
        try:
            if (weights := self.weights) is not None:
                check_weights(weights.bits, weights.group_size)
        except UserError as error:
            raise UserError(
                f"scheme.rules: name {self.name!r} for layers {self.layers!r}: {error}; {NONE} leaves the linears in "
                "floating point"
            ) from error
        if self.weights is None and self.symmetric is not None:
            raise UserError(
                f"scheme.rules: symmetric {self.symmetric} for layers {self.layers!r} has no weights to apply to: "
                f"remove it, or give a name other than {NONE}"
            )

    @cached_property
    def weights(self) -> SchemeName | None:
        """The parsed name; None if the rule leaves the linears in floating point."""
        return None if self.name.lower() == NONE else parse_scheme(self.name)

    def matches(self, linear: str) -> bool:
        """True if the pattern matches the full name of a linear, such as ``model.layers.0.mlp.up_proj``."""
        return self._pattern.fullmatch(linear) is not None

    def check_activations(self, scheme: str, activation_bits: int, kv_bits: int) -> None:
        """Refuse a name whose activation bits differ from those of the scheme.

        Args:
            scheme: name of the scheme.
            activation_bits: bits of activations in the scheme.
            kv_bits: bits of keys and values in the scheme; the name of a rule may omit them.

        Raises:
            UserError: names the rule, both values and the required change.
        """
        if self.weights is None:
            return
        _, inputs, keys_values, _ = self.weights
        for what, given, own, remedy in (
            ("activations", inputs, activation_bits, f"write A{activation_bits}"),
            ("keys and values", keys_values, kv_bits if keys_values != 16 else 16, "leave out KV"),
        ):
            if given != own:
                raise UserError(
                    f"scheme.rules: name {self.name!r} for layers {self.layers!r} has {what} of {given} bits, but "
                    f"scheme {scheme} has {own}: a rule changes only weights, so {remedy}"
                )

    @cached_property
    def _pattern(self) -> re.Pattern[str]:
        regex = self.layers.startswith(_REGEX)
        return re.compile(self.layers.removeprefix(_REGEX) if regex else fnmatch.translate(self.layers))

    def __str__(self) -> str:
        symmetry = {None: "", True: " symmetric", False: " asymmetric"}[self.symmetric]
        return f"{self.layers}: {self.name}{symmetry}"
