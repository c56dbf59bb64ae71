# SPDX-License-Identifier: Apache-2.0
"""One sweep of coordinate descent equals its sequential definition to the last code."""

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from omniq.grid.affine import Grid
from omniq.kernels.coordinate_descent import keep_codes_, sweep_
from omniq.kernels.layer_problem import (
    empty_codes,
    objective,
    prepare,
    to_residual_,
    to_values_,
    unpack_codes,
)
from omniq.solvers.coordinate_descent import is_relaxed
from tests.helpers.descent import codes_of, sweep
from tests.helpers.synthetic_layer import dequantize, fit_grid, make_layer

Case = dict[str, Any]


def sequential(case: Case, values: Tensor, rounded: bool) -> Tensor:
    """One sweep by the book, a column at a time, in float64: the definition."""
    target, gram, group, levels = case["target"], case["gram"], case["group_index"], 2 ** case["bits"] - 1
    dead = gram.diagonal() <= 1e-8 * gram.diagonal().mean()
    values = values.clone()
    for j in range(target.shape[1]):
        residual = (target - values).masked_fill(dead, 0)
        s, z = case["scale"][:, group[j]], case["zero_point"][:, group[j]]
        u = target[:, j] if dead[j] else values[:, j] + residual @ gram[:, j] / gram[j, j]
        v = ((u / s).round() + z).clamp(0, levels)
        v = (v - z) * s
        free = case["mask"][:, j] if case["mask"] is not None else torch.zeros(len(u), dtype=torch.bool)
        values[:, j] = torch.where(free | torch.tensor(not rounded and not bool(dead[j])), u, v)
    return values


@st.composite
def cases(draw: st.DrawFn) -> Case:
    """Random layers: any shape, bits, groups, masks, dead and nearly dead columns, columns in any order."""
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    outputs, groups = draw(st.integers(1, 6)), draw(st.integers(1, 4))
    inputs, bits = groups * draw(st.integers(1, 24)), draw(st.integers(2, 8))
    x = torch.randn(2 * inputs + 2, inputs, generator=generator, dtype=torch.float64)
    x = x @ torch.randn(inputs, inputs, generator=generator, dtype=torch.float64)
    for column in draw(st.lists(st.integers(0, inputs - 1), max_size=3)):
        x[:, column] *= draw(st.sampled_from([0.0, 1e-6]))
    weight = torch.randn(outputs, inputs, generator=generator, dtype=torch.float64)
    grid = Grid(bits, inputs // groups, draw(st.booleans()))
    scale, zero_point, group_index = fit_grid(weight, grid)
    if draw(st.booleans()):  # act order: the columns permuted, each with the grid of its own group
        order = torch.randperm(inputs, generator=generator)
        weight, x, group_index = weight[:, order], x[:, order], group_index[order]
    mask = torch.rand(weight.shape, generator=generator) < 0.1 if draw(st.booleans()) else None
    return {
        "target": weight, "gram": x.t() @ x, "scale": scale, "zero_point": zero_point, "bits": bits,
        "group_index": group_index, "mask": mask,
    }  # fmt: skip


def start_of(case: Case, on_grid: bool) -> Tensor:
    """W itself, or W rounded to the nearest."""
    if not on_grid:
        return case["target"].clone()
    problem = prepare(**case, precision="float64")
    return to_values_(problem, torch.zeros_like(problem.target), rounded=True).t()


@settings(max_examples=60, deadline=None)
@given(case=cases(), on_grid=st.booleans(), block=st.sampled_from([3, 40, 256]))
def test_sweep_codes_equal_sequential_definition(case: Case, on_grid: bool, block: int) -> None:
    problem = prepare(**case, precision="float64", block=block)
    expected = start_of(case, on_grid)
    residual = to_residual_(problem, expected.t().clone().contiguous())
    for rounded in (True, False, True, True):
        expected = sequential(case, expected, rounded)
        sweep_(problem, residual, rounded)
        actual = to_values_(problem, residual.clone(), rounded).t()
        torch.testing.assert_close(actual, expected, rtol=1e-6, atol=1e-8)
    scale, zero_point = (case[key][:, case["group_index"]] for key in ("scale", "zero_point"))
    codes = ((expected / scale).round() + zero_point).clamp(0, 2 ** case["bits"] - 1)
    assert int((codes_of(problem, residual).t() != codes).sum()) == 0


@settings(max_examples=30, deadline=None)
@given(case=cases())
def test_sweep_on_grid_never_raises_row_error(case: Case) -> None:
    values = start_of(case, on_grid=True)
    for rounded in (True, True, False, True):
        done = sweep(**case, values=values, rounded=rounded, precision="float64")
        before, after = (_row_errors(case, each) for each in (values, done.values))
        torch.testing.assert_close(done.gain, after - before, rtol=1e-6, atol=float(1e-9 * before.sum()))
        if case["mask"] is None or rounded:
            assert (done.gain <= 1e-12 * before).all()
        values = done.values if rounded else start_of(case, on_grid=True)


def _row_errors(case: Case, values: Tensor) -> Tensor:
    """``d S d^T`` with dead columns left out."""
    dead = case["gram"].diagonal() <= 1e-8 * case["gram"].diagonal().mean()
    residual = (case["target"] - values).masked_fill(dead, 0)
    return ((residual @ case["gram"]) * residual).sum(1)


@settings(max_examples=20, deadline=None)
@given(case=cases())
def test_sweep_unmasked_values_lie_on_grid(case: Case) -> None:
    done = sweep(**case, values=case["target"], precision="float64")
    dense = dequantize(done.codes, case["scale"], case["zero_point"], case["group_index"])
    rounded = torch.ones_like(dense, dtype=torch.bool) if case["mask"] is None else ~case["mask"]
    assert torch.equal(done.values[rounded], dense[rounded])


def test_sweep_changed_counts_changed_codes() -> None:
    weight, gram = (tensor.float() for tensor in make_layer(32, 48, tokens=200))
    scale, zero_point, _ = fit_grid(weight, Grid(3))
    first = sweep(weight, gram, weight, scale, zero_point, 3)
    second = sweep(weight, gram, first.values, scale, zero_point, 3)
    assert int(second.changed) == int((second.codes != first.codes).sum()) > 0


def test_sweep_nearly_dead_columns_stay_bounded() -> None:
    weight, gram = make_layer(24, 64, tokens=300)
    faint = torch.ones(64, dtype=torch.float64)
    faint[[3, 40]] = torch.tensor([0.0, 1e-6], dtype=torch.float64)  # exactly dead, and 1e-12 of the power
    gram = gram * faint * faint[:, None]
    scale, zero_point, _ = fit_grid(weight, Grid(4))
    values = weight
    for rounded in (True, False, False, True):
        values = sweep(weight, gram, values, scale, zero_point, 4, rounded=rounded).values
        nearest = ((weight / scale).round() + zero_point).clamp(0, 15)
        assert torch.equal(values[:, [3, 40]], ((nearest - zero_point) * scale)[:, [3, 40]].float())
        assert values.abs().max() < 2 * weight.abs().max()


def test_sweep_all_columns_dead_rounds_to_nearest() -> None:
    weight = torch.randn(5, 8, generator=torch.Generator().manual_seed(0))
    scale, zero_point, _ = fit_grid(weight, grid := Grid(4))
    done = sweep(weight, torch.zeros(8, 8), weight, scale, zero_point, 4)
    assert torch.equal(done.codes, grid.quantize(weight, scale, zero_point))


def test_sweep_float32_error_is_near_float64() -> None:
    weight, gram = make_layer(96, 160, tokens=600)
    scale, zero_point, _ = fit_grid(weight, Grid(4))
    errors = {}
    for precision in ("float32", "tf32", "float64"):
        problem = prepare(weight, gram, scale, zero_point, 4, precision=precision)
        residual = torch.zeros_like(problem.target)
        total = objective(problem, residual)
        for k in range(12):
            total += sweep_(problem, residual, not is_relaxed(k, 12))[1]
        torch.testing.assert_close(total, objective(problem, residual), rtol=1e-4, atol=0)  # measured 7e-6
        errors[precision] = float(total.sum())
    assert errors["float32"] == errors["tf32"] == pytest.approx(errors["float64"], rel=5e-3)


@settings(max_examples=20, deadline=None)
@given(case=cases(), block=st.sampled_from([3, 40, 256]))
def test_keep_codes_of_some_rows_packs_them(case: Case, block: int) -> None:
    problem = prepare(**case, precision="float64", block=block)
    residual = torch.zeros_like(problem.target)
    sweep_(problem, residual, True)
    rows = torch.arange(residual.shape[1]) % 2 == 1
    packed = empty_codes(problem)
    keep_codes_(problem, residual, rows, packed)
    assert len(packed) == (-(-len(residual) // 2) if case["bits"] <= 4 else len(residual))
    assert torch.equal(unpack_codes(problem, packed), torch.where(rows, codes_of(problem, residual), 0))
