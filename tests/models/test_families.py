# SPDX-License-Identifier: Apache-2.0
"""The modules and equivalences that families name exist in their blocks."""

from typing import Any

import pytest
from torch import nn
from transformers import AutoConfig

from omniq.errors import UserError
from omniq.models.families import FAMILIES, family_of, family_of_type
from tests.helpers.tiny import tiny_block


@pytest.mark.parametrize("family", [name for family in FAMILIES for name in family.model_types])
def test_family_layout_names_modules_of_its_blocks(family: str) -> None:
    described, block = family_of_type(family), tiny_block(family)[0]
    known = described.layout(block, 0)
    linears = {name for name, module in block.named_modules() if isinstance(module, nn.Linear)}
    assert {*known.linears, *linears.intersection(known.kept)} == linears
    kinds = {equivalence.kind for equivalence in known.equivalences}
    assert kinds >= {"value_output", "query_key"} | ({"norm"} if family not in ("olmo2", "olmo3") else set())
    for equivalence in known.equivalences:
        assert linears.issuperset(equivalence.readers)
        assert linears.issuperset(equivalence.factored)
        if equivalence.kind == "norm":
            assert equivalence.readers in known.groups
            assert not isinstance(block.get_submodule(equivalence.modules[0]), nn.Linear)
        elif equivalence.kind == "query_key":
            assert bool(equivalence.factored) == (equivalence.query_norm is None)


def test_family_model_types_are_claimed_once() -> None:
    names = [name for family in FAMILIES for name in family.model_types]
    assert len(names) == len(set(names))


def test_layout_of_bloom_slow_but_exact_is_refused() -> None:
    config = AutoConfig.for_model("bloom", slow_but_exact=True, pretraining_tp=4)
    with pytest.raises(UserError, match="slow_but_exact multiplies parts of its weights: set slow_but_exact to false"):
        family_of(config)


@pytest.mark.parametrize(
    ("family", "overrides", "lacks"),
    [
        ("opt", {"do_layer_norm_before": False}, "norm"),
        ("opt", {"activation_function": "gelu"}, "up_down"),
        ("bloom", {"apply_residual_connection_post_layernorm": True}, "norm"),
    ],
)
def test_layout_omits_equivalences_that_a_variant_lacks(family: str, overrides: dict[str, Any], lacks: str) -> None:
    usual, variant = (
        {each.kind for each in family_of_type(family).layout(tiny_block(family, **changes)[0], 0).equivalences}
        for changes in ({}, overrides)
    )
    assert usual - variant == {lacks}
