# SPDX-License-Identifier: Apache-2.0
"""GPTQ equals elimination column by column and has the measured layer errors."""

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from omniq.errors import UserError
from omniq.grid.affine import Grid
from omniq.solvers.gptq import gptq, inverse_factor
from tests.helpers.synthetic_layer import dequantize, fit_grid, make_layer, relative_error

Case = dict[str, Any]


def by_elimination(case: Case) -> tuple[Tensor, Tensor]:
    """Codes and sparse part by optimal brain quantization in a fixed order, without a Cholesky factor.

    arXiv 2210.17323, equations 2 and 3.
    """
    weight, gram, group, levels = case["weight"].clone(), case["gram"], case["group_index"], 2 ** case["bits"] - 1
    outputs, inputs = weight.shape
    diagonal = gram.diagonal()
    dead = diagonal <= 1e-8 * diagonal.mean()
    damped = gram * ~dead * ~dead[:, None]
    damped += torch.where(dead, 1.0, case["damping"] * diagonal.mean()).diag()
    inverse = torch.linalg.inv(damped)
    codes, kept = torch.zeros(outputs, inputs, dtype=torch.uint8), torch.zeros_like(weight)
    order = diagonal.argsort(descending=True, stable=True) if case["act_order"] else torch.arange(inputs)
    for j in order.tolist():
        s, z = case["scale"][:, group[j]], case["zero_point"][:, group[j]]
        q = ((weight[:, j] / s).round() + z).clamp(0, levels)
        if case["mask"] is not None:
            q = torch.where(case["mask"][:, j], z, q)
            kept[:, j] = weight[:, j] * case["mask"][:, j]
        codes[:, j] = q.to(torch.uint8)
        error = weight[:, j] - (q - z) * s - kept[:, j]
        weight -= error[:, None] * inverse[j] / inverse[j, j]
        inverse = inverse - torch.outer(inverse[:, j], inverse[j]) / inverse[j, j]
        inverse[j, j] = 1.0  # never used again
    return codes, kept


@st.composite
def cases(draw: st.DrawFn) -> Case:
    """Random layers with groups, masks, dead columns and either order."""
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    outputs, groups, bits = draw(st.integers(1, 6)), draw(st.integers(1, 4)), draw(st.integers(2, 8))
    inputs = groups * draw(st.integers(1, 15))
    x = torch.randn(3 * inputs + 2, inputs, generator=generator, dtype=torch.float64)
    x = x @ torch.randn(inputs, inputs, generator=generator, dtype=torch.float64)
    for column in draw(st.lists(st.integers(0, inputs - 1), max_size=2)):
        x[:, column] = 0
    weight = torch.randn(outputs, inputs, generator=generator, dtype=torch.float64)
    scale, zero_point, group_index = fit_grid(weight, Grid(bits, inputs // groups))
    return {
        "weight": weight, "gram": x.t() @ x, "scale": scale, "zero_point": zero_point, "bits": bits,
        "group_index": group_index, "act_order": draw(st.booleans()), "damping": draw(st.sampled_from([0.01, 0.1])),
        "mask": torch.rand(weight.shape, generator=generator) < 0.1 if draw(st.booleans()) else None,
    }  # fmt: skip


@settings(max_examples=60, deadline=None)
@given(case=cases(), block=st.sampled_from([1, 7, 128]))
def test_gptq_codes_equal_definition(case: Case, block: int) -> None:
    solution = gptq(**case, block=block)
    codes, kept = by_elimination(case)
    assert int((solution.codes != codes).sum()) == 0
    dense = dequantize(codes, case["scale"], case["zero_point"], case["group_index"])
    assert (solution.sparse is None) == (case["mask"] is None)
    torch.testing.assert_close(solution.values(case["group_index"]), dense + kept, rtol=1e-6, atol=1e-9)


def test_gptq_dead_columns_round_to_nearest() -> None:
    weight, gram = make_layer(12, 40, tokens=200)
    gram = gram * (torch.arange(40) != 3) * (torch.arange(40) != 3)[:, None]
    scale, zero_point, _ = fit_grid(weight, grid := Grid(3))
    for act_order in (False, True):
        codes = gptq(weight, gram, scale, zero_point, 3, act_order=act_order).codes
        assert torch.equal(codes[:, 3], grid.quantize(weight, scale, zero_point)[:, 3])


def test_inverse_factor_equals_cholesky_of_inverse() -> None:
    _, gram = make_layer(4, 30, tokens=200)
    upper = inverse_factor(gram, 0.01)
    damped = gram + 0.01 * gram.diagonal().mean() * torch.eye(30)
    torch.testing.assert_close(upper.t() @ upper @ damped, torch.eye(30, dtype=torch.float64))
    assert torch.equal(upper, upper.triu())


def test_gptq_indefinite_gram_raises_damping(caplog: pytest.LogCaptureFixture) -> None:
    """A float32 sum of products can be indefinite; here 1 % of damping is too little and 10 % suffices."""
    weight, gram = make_layer(8, 24, tokens=100)
    gram = gram - 0.05 * gram.diagonal().mean() * torch.eye(24)
    assert torch.linalg.eigvalsh(gram + 0.01 * gram.diagonal().mean() * torch.eye(24))[0] < 0
    scale, zero_point, _ = fit_grid(weight, Grid(4))
    codes = gptq(weight, gram, scale, zero_point, 4).codes
    assert caplog.messages == ["damping 0.01 does not make 24 inputs positive definite: 0.1 does"]
    assert torch.equal(codes, gptq(weight, gram, scale, zero_point, 4, damping=0.1).codes)
    assert len(caplog.messages) == 1


def test_gptq_unusable_gram_is_refused() -> None:
    weight, gram = make_layer(8, 24, tokens=100)
    scale, zero_point, _ = fit_grid(weight, Grid(4))
    indefinite = 9 * torch.ones(24, 24, dtype=torch.float64) - 8 * torch.eye(24)
    with pytest.raises(UserError, match=r"24 inputs is not positive definite with damping 0\.01.*more calibration"):
        gptq(weight, indefinite, scale, zero_point, 4)
    with pytest.raises(UserError, match="24 inputs is not positive definite with damping 0: use more calibration"):
        gptq(weight, indefinite, scale, zero_point, 4, damping=0.0)
    gram[4, 5] = gram[5, 4] = gram[4, 4] = torch.inf
    with pytest.raises(UserError, match="not finite for 1 of 24 inputs"):
        gptq(weight, gram, scale, zero_point, 4)


@pytest.mark.parametrize(("bits", "expected"), [(4, 0.432), (3, 1.969), (2, 9.659)])
def test_gptq_layer_error_matches_measured(bits: int, expected: float) -> None:
    """Error in % on the 576 x 576 layer, per channel, as measured with a plain float64 implementation (spec 10.2)."""
    weight, gram = make_layer(576, 576)
    scale, zero_point, _ = fit_grid(weight, Grid(bits, scale_dtype=torch.float32))
    values = gptq(weight, gram, scale, zero_point, bits).values()
    assert 100 * relative_error(weight, values, gram) == pytest.approx(expected, rel=1e-3, abs=0.0005)
