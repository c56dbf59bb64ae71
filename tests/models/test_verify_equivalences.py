# SPDX-License-Identifier: Apache-2.0
"""Verification accepts the declared equivalences of each family and refuses wrong ones."""

from dataclasses import replace
from typing import Any

import pytest
import torch

from omniq.models.families import FAMILIES, family_of_type
from omniq.models.verify_equivalences import TOLERANCE, VerifiedBlock
from omniq.transforms.equivalence import Equivalence
from omniq.transforms.equivalences import NormToLinears, UpToDown
from tests.helpers.tiny import HALF_TURNED, tiny_block

DECLARED: list[tuple[str, dict[str, Any]]] = [(name, {}) for family in FAMILIES for name in family.model_types]


def verified(family: str, dtype: torch.dtype = torch.float64, scale: float = 1.0, **model: Any) -> VerifiedBlock:
    """The first block of a tiny model on random inputs of this size."""
    block, kwargs = tiny_block(family, **model)
    hidden = scale * torch.randn(1, 16, 64, generator=torch.Generator().manual_seed(1))
    return VerifiedBlock(block, family_of_type(family).layout(block, 0), hidden, kwargs, dtype)


def of_kind(block: VerifiedBlock, kind: str) -> Equivalence:
    return next(each for each in block.layout.equivalences if each.kind == kind)


@pytest.mark.parametrize(("family", "model"), [*DECLARED, ("llama", HALF_TURNED), ("phi3", HALF_TURNED)])
def test_verified_block_declared_equivalence_has_small_error(family: str, model: dict[str, Any]) -> None:
    for dtype, most in ((torch.float64, 1e-13), (torch.float32, 5e-6)):  # measured 1.1e-15 and 5.9e-7
        block = verified(family, dtype, **model)
        for equivalence in block.layout.equivalences:
            error = block.error(equivalence)
            assert error <= most, equivalence
            assert error > 0 or dtype == torch.float64


@pytest.mark.parametrize("family", ["gemma", "gemma2", "gemma3_text"])
@pytest.mark.parametrize("dtype", list(TOLERANCE))
def test_verified_block_plain_norm_of_gemma_has_large_error(family: str, dtype: torch.dtype) -> None:
    block = verified(family, dtype)
    norm = of_kind(block, "norm")
    assert isinstance(norm, NormToLinears)
    assert block.error(replace(norm, offset=0)) > 0.1  # measured 0.45 and more


def test_verified_block_wrong_declarations_have_large_error() -> None:
    block = verified("llama")
    norm = of_kind(block, "norm")
    assert isinstance(norm, NormToLinears)
    forgotten = NormToLinears(norm.norm, norm.linears[:-1])
    assert block.error(forgotten) > 0.1
    assert block.error(UpToDown("mlp.gate_proj", "mlp.down_proj")) > 0.1  # an activation lies between them
    assert block.error(UpToDown("mlp.up_proj", "mlp.down_proj", power=2)) > 0.1
    phi = verified("phi3")
    phi.layout = replace(phi.layout, heads=replace(phi.layout.heads, rotary=4))  # it turns whole heads
    assert phi.error(of_kind(phi, "query_key")) > 1e-3


def test_verified_block_large_residual_does_not_hide_wrong_equivalence() -> None:
    """The norms make the contribution of the block independent of the size of its input."""
    block = verified("gemma", scale=1e6)
    norm = of_kind(block, "norm")
    assert isinstance(norm, NormToLinears)
    wrong = replace(norm, offset=0)
    assert (block.output - block.hidden).norm() < 1e-5 * block.output.norm()
    assert block.error(wrong) > 0.1
    assert block.error(norm) < TOLERANCE[torch.float64]


def test_verified_block_error_leaves_tensors_unchanged() -> None:
    block = verified("opt")
    before = {name: value.clone() for name, value in block.tensors.items()}
    for equivalence in block.layout.equivalences:
        block.error(equivalence)
    assert all(torch.equal(value, before[name]) for name, value in block.block.named_parameters())


def test_verified_block_with_nonfinite_output_reports_no_error() -> None:
    block, kwargs = tiny_block("llama")
    block.get_parameter("mlp.up_proj.weight")[0, 0] = torch.nan
    layout = family_of_type("llama").layout(block, 0)
    broken = VerifiedBlock(block, layout, torch.randn(1, 16, 64), kwargs, torch.float64)
    assert broken.error(of_kind(broken, "norm")) == 0
