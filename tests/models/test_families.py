# SPDX-License-Identifier: Apache-2.0
"""The modules and equivalences that families name exist in their blocks."""

import pytest
from torch import nn
from transformers import AutoConfig

from omniq.errors import UserError
from omniq.models.families import FAMILIES, family_of
from tests.helpers.tiny import tiny_model


@pytest.mark.parametrize("family", [name for family in FAMILIES for name in family.model_types])
def test_family_layout_names_modules_of_its_blocks(family: str) -> None:
    model = tiny_model(family)
    described = family_of(model.config)
    block = model.get_submodule(described.blocks)[0]
    known = described.layout(block, 0)
    linears = {name for name, module in block.named_modules() if isinstance(module, nn.Linear)}
    assert set(known.linears) == linears
    assert {equivalence.kind for equivalence in known.equivalences} >= {"norm", "value_output", "query_key"}
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


def test_family_of_post_norm_opt_is_refused() -> None:
    config = AutoConfig.for_model("opt", do_layer_norm_before=False)
    with pytest.raises(UserError, match=r"do_layer_norm_before=false \(opt-350m\).*: use another size of OPT"):
        family_of(config)
