# SPDX-License-Identifier: Apache-2.0
"""Schemes: the bits and grids that a name stands for, and names and settings that are refused."""

import re
from typing import Any

import pytest
import torch

from omniq.errors import UserError
from omniq.grid.affine import Grid
from omniq.grid.name import parse_scheme
from omniq.grid.scheme import Activations, Scheme


def test_scheme_name_gives_activations() -> None:
    assert Scheme("W6A6").activations == Activations(6)
    assert Scheme("W4A4KV8", queries=True, activation_symmetric=True).activations == Activations(4, 4, 8, True)
    assert Scheme("W8A8", activation_range="tensor").activations == Activations(8, static=True)
    assert not Scheme("W3A16g128").activations.quantized
    assert Scheme("W4A16KV4").activations == Activations(16, 16, 4)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"name": "W4A12"}, "scheme.name 'W4A12': activations of 12 bits are not possible: use 2 to 8, or 16"),
        ({"name": "W4A4KV1"}, "scheme.name 'W4A4KV1': keys and values of 1 bits are not possible"),
        ({"name": "W4A16", "activation_symmetric": True}, "activation_symmetric: 'W4A16' quantizes no activations"),
        (
            {"name": "W4A16KV4", "activation_range": "tensor"},
            "scheme.activation_range: 'W4A16KV4' quantizes no inputs of linears; use a name such as W8A8",
        ),
        ({"name": "W4A16", "queries": True}, "scheme.queries: 'W4A16' has no activation bits to give to queries"),
        ({"name": "W9A16"}, "weight bits 9 are outside 2..8"),
        ({"name": "int4"}, "scheme 'int4' is not understood"),
    ],
)
def test_scheme_impossible_settings_are_refused(settings: dict[str, Any], words: str) -> None:
    with pytest.raises(UserError, match=re.escape(words)):
        Scheme(**settings)


def test_scheme_name_gives_grid() -> None:
    assert Scheme("W3A16g64", symmetric=True, dtype="bfloat16").grid == Grid(3, 64, True, torch.bfloat16)


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("W4A16", (4, 16, 16, -1)),
        ("W3A16g128", (3, 16, 16, 128)),
        ("w2a16G64", (2, 16, 16, 64)),
        ("W8A8", (8, 8, 16, -1)),
        ("W4A4KV8", (4, 4, 8, -1)),
        ("W4A4KV4g128", (4, 4, 4, 128)),
    ],
)
def test_parse_scheme_name_gives_bits_and_group_size(name: str, expected: tuple[int, int, int, int]) -> None:
    assert parse_scheme(name) == expected


@pytest.mark.parametrize(
    "name", ["", "W4", "4A16", "W4A16 g128", "W4A16g", "W4A16g-1", "W-4A16", "W4A16g128x", "W4A16G64KV8"]
)
def test_parse_scheme_malformed_name_is_refused(name: str) -> None:
    with pytest.raises(UserError, match=f"scheme {name!r} is not understood: write W<bits>A<bits>"):
        parse_scheme(name)


def test_parse_scheme_group_size_zero_is_refused() -> None:
    """A group size of 0 does not mean per-channel."""
    with pytest.raises(UserError, match="group size 0 is not usable"):
        Grid(4, parse_scheme("W4A16g0")[3])
