# SPDX-License-Identifier: Apache-2.0
"""Rules of a scheme: the grid of each linear equals a naive reading, and bad rules are refused by name."""

import fnmatch
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from omniq.errors import UserError
from omniq.grid.affine import Grid
from omniq.grid.rule import Rule
from omniq.grid.scheme import Scheme

PARTS = ["self_attn.q_proj", "self_attn.o_proj", "mlp.up_proj", "mlp.down_proj"]
NAMES = [f"model.layers.{index}.{part}" for index in (0, 1, 10) for part in PARTS]
PATTERNS = [
    "*",
    "model.layers.1*",
    "model.layers.1.*",
    "*.[qo]_proj",
    "model.layers.?.mlp.down_proj",
    "down_proj",
    "MODEL.*",
    "re:.*down_proj",
    "re:down_proj",
    r"re:model\.layers\.\d\..*",
    "re:.*(q|up)_proj",
]
WEIGHTS = {"none": None, "NONE": None, "W8A16": (8, -1), "W4A16g128": (4, 128), "w2A16g16": (2, 16)}


def naive_grid(name: str, symmetric: bool, rules: list[Rule]) -> Grid | None:
    """Rule after rule: each that matches replaces what was found before."""
    found: Grid | None = Grid(4, 64, symmetric)
    for rule in rules:
        if rule.layers.startswith("re:"):
            matches = re.fullmatch(rule.layers[3:], name) is not None
        else:
            matches = fnmatch.fnmatchcase(name, rule.layers)
        if matches:
            weights = WEIGHTS[rule.name]
            own = symmetric if rule.symmetric is None else rule.symmetric
            found = None if weights is None else Grid(*weights, own)
    return found


@st.composite
def rules(draw: st.DrawFn) -> Rule:
    name = draw(st.sampled_from(list(WEIGHTS)))
    symmetric = None if WEIGHTS[name] is None else draw(st.sampled_from([None, False, True]))
    return Rule(draw(st.sampled_from(PATTERNS)), name, symmetric)


@settings(max_examples=200, deadline=None)
@given(chosen=st.lists(rules(), max_size=5), symmetric=st.booleans(), name=st.sampled_from(NAMES))
def test_grid_of_equals_naive_reading_of_rules(chosen: list[Rule], symmetric: bool, name: str) -> None:
    scheme = Scheme("W4A16g64", symmetric, rules=tuple(chosen))
    assert scheme.grid_of(name) == naive_grid(name, symmetric, chosen)
    assert {scheme.grid_of(each) for each in NAMES} <= {*scheme.grids, None}


def test_grid_of_without_rules_is_grid_of_name() -> None:
    scheme = Scheme("W3A16g64", dtype="bfloat16")
    assert scheme.grid_of("anything") == scheme.grid == Grid(3, 64, scale_dtype=torch.bfloat16)
    assert scheme.grids == (scheme.grid,)
    assert str(scheme) == "W3A16g64"


def test_scheme_with_rules_prints_them() -> None:
    scheme = Scheme(rules=(Rule("re:.*down_proj", "W8A16", symmetric=True), Rule("model.layers.0.*", "none")))
    assert str(scheme) == "W4A16; re:.*down_proj: W8A16 symmetric; model.layers.0.*: none"


def test_rule_without_bits_of_keys_and_values_is_accepted() -> None:
    scheme = Scheme("W4A8KV8", rules=(Rule("a", "W8A8"), Rule("b", "W8A8KV8")))
    assert scheme.grid_of("a") == scheme.grid_of("b") == Grid(8)


@pytest.mark.parametrize(
    ("rule", "message"),
    [
        ({"layers": "", "name": "none"}, "scheme.rules: layers is empty: give a glob"),
        ({"layers": "re:", "name": "none"}, "scheme.rules: layers is empty: give a glob"),
        ({"layers": "re:(", "name": "none"}, r"layers 're:\(' is not a regular expression \(.*\): correct it"),
        (
            {"layers": "a", "name": "float"},
            "name 'float' for layers 'a': .*not valid: write W<bits>.*; none leaves",
        ),
        ({"layers": "a", "name": ""}, "name '' for layers 'a': .*not understood"),
        ({"layers": "a", "name": "W9A16"}, "name 'W9A16' for layers 'a': weight bits 9 are outside 2..8"),
        ({"layers": "a", "name": "W4A16g0"}, "name 'W4A16g0' for layers 'a': group size 0 is not usable"),
        ({"layers": "a", "name": "none", "symmetric": True}, "symmetric True for layers 'a' has no weights"),
        (
            {"layers": "a", "name": "W4A8"},
            "'W4A8' for layers 'a' has activations of 8 bits, but scheme W4A16 has 16: .*A16",
        ),
        ({"layers": "a", "name": "W4A16KV4"}, "'W4A16KV4' for layers 'a' has keys and values of 4 bits.*leave out KV"),
    ],
)
def test_rule_with_bad_settings_is_refused_by_name(rule: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message) as caught:
        Scheme(rules=(Rule(**rule),))
    assert "\n" not in str(caught.value)


def test_scheme_check_imports_no_torch() -> None:
    code = (
        "import sys; from omniq.grid.scheme import Rule, Scheme; "
        "Scheme('W4A8KV8', rules=(Rule('re:.*x', 'W8A8'),)).activations; assert 'torch' not in sys.modules"
    )
    root = Path(__file__).parents[2]
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=root, check=False)
    assert done.returncode == 0, done.stderr
