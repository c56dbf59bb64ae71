# SPDX-License-Identifier: Apache-2.0
"""Supports of a sparse part, hard thresholding, and the layer errors that both ways to use them reach."""

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from omniq.errors import UserError
from omniq.grid.affine import Grid
from omniq.quantizers.search import search_range
from omniq.solvers.alternating_descent import AlternatingDescent
from omniq.solvers.coordinate_descent import CoordinateDescent
from omniq.solvers.gptq import gptq
from omniq.solvers.outliers import choose_support, count_of, hard_threshold, largest_eigenvalue, threshold_step
from tests.helpers.synthetic_layer import fit_grid, make_layer, relative_error


def row_errors(residual: Tensor, gram: Tensor) -> Tensor:
    return ((residual @ gram) * residual).sum(1)


@settings(max_examples=40, deadline=None)
@given(
    outputs=st.integers(1, 12),
    inputs=st.integers(1, 12),
    fraction=st.sampled_from([0.0, 0.01, 0.1, 0.5]),
    by=st.sampled_from(["magnitude", "loss"]),
    structured=st.booleans(),
    ties=st.booleans(),
)
def test_choose_support_has_exact_count(
    outputs: int, inputs: int, fraction: float, by: Any, structured: bool, ties: bool
) -> None:
    generator = torch.Generator().manual_seed(outputs * 13 + inputs)
    weight = torch.randn(outputs, inputs, generator=generator)
    weight = weight.sign() if ties else weight
    second_moment = torch.rand(inputs, generator=generator)
    mask = choose_support(weight, fraction, by=by, structured=structured, second_moment=second_moment, grid=Grid(3))
    chosen = mask.any(0).sum() if structured else mask.sum()
    assert int(chosen) == count_of((outputs, inputs), fraction, structured)
    assert bool(mask.any()) == (fraction > 0)  # a share of a narrow layer that rounds to nothing is one
    assert not structured or torch.equal(mask, mask.any(0).expand_as(mask))
    if by == "magnitude" and not structured and mask.any():
        assert weight.abs()[mask].min() >= weight.abs().masked_fill(mask, 0).max()


def test_choose_support_ties_go_to_first() -> None:
    mask = choose_support(torch.ones(2, 5), 0.3)
    assert mask.flatten().nonzero().flatten().tolist() == [0, 1, 2]


def test_choose_support_by_loss_takes_costliest_weights() -> None:
    """On the range that is best without what was chosen before, three times in turn."""
    weight, gram = make_layer(12, 64, tokens=300)
    grid, second_moment = Grid(3, 32), gram.diagonal()
    chosen = torch.zeros_like(weight, dtype=torch.bool)
    for _ in range(3):
        lo, hi = (
            end.repeat_interleave(32, 1) for end in search_range(weight.masked_fill(chosen, 0), grid, second_moment)
        )
        scale = ((hi - lo) / 7).half().double()
        zero = (-lo / scale).round()
        rounded = (((weight / scale).round() + zero).clamp(0, 7) - zero) * scale
        cost = (weight - rounded).square() * second_moment
        chosen = cost >= cost.flatten().topk(12).values[-1]
    found = choose_support(weight, 1 / 64, by="loss", second_moment=second_moment, grid=grid)
    assert torch.equal(found, chosen)
    assert not torch.equal(found, choose_support(weight, 1 / 64))


@pytest.mark.parametrize("structured", [False, True])
def test_choose_support_by_loss_leaves_less_error_than_by_magnitude(structured: bool) -> None:
    weight, gram = make_layer(576, 576)
    weight, grid, second_moment, left = weight[::8], Grid(3), gram.diagonal(), {}
    ways: list[Any] = ["loss", "magnitude"]
    for by in ways:
        mask = choose_support(weight, 0.02, by=by, structured=structured, second_moment=second_moment, grid=grid)
        dense = weight.masked_fill(mask, 0)
        scale, zero_point = grid.fit(*search_range(dense, grid, second_moment))
        rounded = grid.dequantize(grid.quantize(dense, scale, zero_point), scale, zero_point)
        left[by] = float(((dense - rounded).square() * second_moment).sum())
    assert left["loss"] < 0.95 * left["magnitude"], left


def test_choose_support_invalid_arguments_are_refused() -> None:
    weight = torch.randn(4, 8)
    for fraction in (-0.1, 0.6):
        with pytest.raises(UserError, match=rf"outlier fraction {100 * fraction:g} % is outside 0\.\.50 %"):
            choose_support(weight, fraction)
    with pytest.raises(ValueError, match="support by 'loss' needs second_moment and grid"):
        choose_support(weight, 0.1, by="loss")


@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 2**31), inputs=st.integers(1, 40))
def test_largest_eigenvalue_of_random_gram_equals_eigvalsh(seed: int, inputs: int) -> None:
    x = torch.randn(2 * inputs, inputs, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    gram = x.t() @ x
    expected = float(torch.linalg.eigvalsh(gram)[-1])
    assert float(largest_eigenvalue(gram)) == pytest.approx(expected, rel=1e-3)
    assert float(largest_eigenvalue(gram)) <= expected * (1 + 1e-12)
    assert torch.equal(largest_eigenvalue(gram), largest_eigenvalue(gram))


@pytest.mark.parametrize("size", [0.0, 1e-25, 1e25])
def test_largest_eigenvalue_of_extreme_gram_is_finite(size: float) -> None:
    gram = torch.tensor([[2.0, 1.0], [1.0, 2.0]]) * size
    assert float(largest_eigenvalue(gram)) == pytest.approx(3 * size)


def test_alternating_descent_with_dead_inputs_keeps_outliers() -> None:
    """Its codes leave them out, and the deployed model may have inputs there."""
    weight = torch.randn(6, 16, generator=torch.Generator().manual_seed(0))
    grid, support = Grid(3), choose_support(weight, 0.1)
    scale, zero_point, _ = fit_grid(weight.masked_fill(support, 0), grid)
    optimizer = AlternatingDescent(
        [nn.Parameter(weight.clone())],
        torch.zeros(16, 16),
        grid,
        scale,
        zero_point,
        support=support,
        rows=[6],
        sweeps=3,
    )
    for _ in range(3):
        optimizer.step()
    codes, scale, zero_point, sparse = optimizer.result()
    assert sparse is not None
    assert torch.equal(sparse, torch.where(support, weight, 0))
    rest = (weight - grid.dequantize(codes, scale, zero_point) - sparse)[~support]
    assert (rest.abs() <= scale.max()).all()


@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 2**31), structured=st.booleans())
def test_threshold_step_never_raises_error(seed: int, structured: bool) -> None:
    generator = torch.Generator().manual_seed(seed)
    weight, dense = (torch.randn(6, 20, generator=generator, dtype=torch.float64) for _ in range(2))
    x = torch.randn(60, 20, generator=generator, dtype=torch.float64)
    gram, count = x.t() @ x, 3 if structured else 20
    lambda_max = largest_eigenvalue(gram)
    sparse = hard_threshold(weight - dense, count, structured)
    for _ in range(5):
        before = row_errors(weight - dense - sparse, gram).sum()
        sparse = threshold_step(weight - dense - sparse, sparse, gram, count, lambda_max, structured)
        assert row_errors(weight - dense - sparse, gram).sum() <= before * (1 + 1e-9)
        assert int((sparse != 0).any(0).sum() if structured else (sparse != 0).sum()) <= count


def test_threshold_step_without_threshold_is_gradient_step() -> None:
    """With every entry supported nothing is thresholded, and H moves by ``-grad / (2 lambda_max)``."""
    weight, gram = make_layer(6, 16, tokens=100)
    sparse = torch.zeros_like(weight, requires_grad=True)
    (row_errors(weight - sparse, gram).sum()).backward()
    assert sparse.grad is not None
    lambda_max = torch.linalg.eigvalsh(gram)[-1]
    moved = threshold_step(weight, torch.zeros_like(weight), gram, weight.numel(), lambda_max)
    torch.testing.assert_close(
        moved, -sparse.grad / (2 * lambda_max), rtol=2e-3, atol=0
    )  # 0.1 % is held back for safety


def solve(kind: str, weight: Tensor, gram: Tensor, bits: int, by: Any, structured: bool) -> float:
    """Error in % after 30 sweeps with 1 % outliers on a min-max grid, from codes, scales and float16 sparse part."""
    grid, second_moment = Grid(bits, scale_dtype=torch.float32), gram.diagonal()
    mask = choose_support(weight, 0.01, by=by, structured=structured, second_moment=second_moment, grid=grid)
    scale, zero_point, _ = fit_grid(weight.masked_fill(mask, 0), grid)
    parameter = nn.Parameter(weight.clone())
    if kind == "masked":
        optimizer = CoordinateDescent([parameter], gram, grid, scale, zero_point, mask=mask)
    else:
        settings_ = {"support": mask, "rows": [len(mask)], "structured": structured}
        optimizer = AlternatingDescent([parameter], gram, grid, scale, zero_point, **settings_)
    for _ in range(30):
        optimizer.step()
    codes, scale, zero_point, sparse = optimizer.result()
    assert sparse is not None
    assert int((sparse != 0).sum()) <= int(mask.sum())
    dense = grid.dequantize(codes, scale, zero_point)
    assert relative_error(weight, dense, gram) > 1e-3  # the published code leaves the dense part unrounded
    return 100 * relative_error(weight, dense + sparse.half().float(), gram)


# Error in %: (alternating, structured alternating, masked by magnitude, masked by loss) as measured in spec 10.3.
MEASURED = [
    pytest.param(576, 576, 3, (0.930, 1.923, 0.848, 1.112), id="576x576-3bit"),
    pytest.param(576, 576, 2, (4.858, 8.967, 4.429, 6.417), id="576x576-2bit", marks=pytest.mark.slow),
    pytest.param(1536, 576, 3, (0.690, 1.453, 0.619, 0.695), id="1536x576-3bit", marks=pytest.mark.slow),
    pytest.param(1536, 576, 2, (3.559, 6.596, 3.223, 3.997), id="1536x576-2bit", marks=pytest.mark.slow),
    pytest.param(576, 1536, 3, (0.562, 1.688, 0.570, 0.725), id="576x1536-3bit", marks=pytest.mark.slow),
    pytest.param(576, 1536, 2, (2.906, 7.163, 2.934, 4.374), id="576x1536-2bit", marks=pytest.mark.slow),
]


@pytest.mark.parametrize(("outputs", "inputs", "bits", "expected"), MEASURED)
def test_outliers_layer_error_matches_measured(
    outputs: int, inputs: int, bits: int, expected: tuple[float, ...]
) -> None:
    weight, gram = (tensor.float() for tensor in make_layer(outputs, inputs))
    ways = [("alternating", "magnitude", False), ("alternating", "magnitude", True)]
    ways += [("masked", "magnitude", False), ("masked", "loss", False)]
    for (kind, by, structured), most in zip(ways, expected, strict=True):
        assert solve(kind, weight, gram, bits, by, structured) <= 1.001 * most, (kind, by)  # 1.0006 at most


def test_outliers_on_searched_grid_lower_error() -> None:
    """Searched grid, GPTQ start, 3 bit: 1 % by loss halves the error; 1 % of the columns by loss take a tenth."""
    weight, gram = (tensor.float() for tensor in make_layer(576, 576))
    grid, second_moment, errors = Grid(3), gram.diagonal(), {}
    for name, fraction, structured in (("none", 0.0, False), ("columns", 0.01, True), ("entries", 0.01, False)):
        mask = choose_support(
            weight, fraction, by="loss", structured=structured, second_moment=second_moment, grid=grid
        )
        scale, zero_point = grid.fit(*search_range(weight.masked_fill(mask, 0), grid, second_moment))
        start = nn.Parameter(gptq(weight, gram, scale, zero_point, 3, mask=mask).values())
        optimizer = CoordinateDescent([start], gram, grid, scale, zero_point, target=weight, mask=mask, sweeps=12)
        for _ in range(12):
            error = optimizer.step()
        errors[name] = float(error)
    assert errors["columns"] < 0.92 * errors["none"]  # measured 0.88
    assert errors["entries"] < 0.56 * errors["none"]  # measured 0.53


def test_alternating_descent_resumed_state_gives_same_bits() -> None:
    weight, gram = (tensor.float() for tensor in make_layer(30, 48, tokens=200))
    mask = choose_support(weight, 0.05)
    scale, zero_point, _ = fit_grid(weight.masked_fill(mask, 0), Grid(3))

    def build() -> AlternatingDescent:
        parameter = nn.Parameter(weight.clone())
        return AlternatingDescent([parameter], gram, Grid(3), scale, zero_point, support=mask, rows=[12, 18], sweeps=7)

    whole, other = build(), build()
    for _ in range(4):
        whole.step()
    other.load_state_dict(whole.state_dict())
    for _ in range(3):
        assert float(whole.step()) == float(other.step())
    for mine, theirs in zip(whole.result(), other.result(), strict=True):
        assert mine is not None
        assert theirs is not None
        assert torch.equal(mine, theirs)


def reference_algorithm3(
    weight: Tensor, support: Tensor, gram: Tensor, scale: Tensor, zero_point: Tensor, sweeps: int, structured: bool
) -> tuple[Tensor, Tensor]:
    """Codes and H of one linear, column by column and in float64; every sweep rounds."""
    sparse = torch.where(support, weight, 0)
    dense, codes = weight - sparse, torch.zeros_like(weight)
    for _ in range(sweeps):
        target = weight - sparse
        for j in range(weight.shape[1]):
            others = (target - dense) @ gram[:, j] - (target - dense)[:, j] * gram[j, j]
            codes[:, j] = ((target[:, j] + others / gram[j, j]) / scale[:, 0] + zero_point[:, 0]).round().clamp(0, 7)
            dense[:, j] = (codes[:, j] - zero_point[:, 0]) * scale[:, 0]
        moved = sparse + (weight - dense - sparse) @ gram / torch.linalg.eigvalsh(gram)[-1]
        score = moved.square().sum(0) if structured else moved.abs().flatten()
        kept = torch.zeros_like(score, dtype=torch.bool)
        kept[score.argsort(descending=True)[: int(support[0].sum() if structured else support.sum())]] = True
        sparse = torch.where(kept.expand_as(moved) if structured else kept.view_as(moved), moved, 0)
    return codes, sparse


@pytest.mark.parametrize("structured", [False, True])
def test_alternating_descent_stacked_linears_equal_float64_reference_of_each(structured: bool) -> None:
    """Each linear keeps its own number of outliers, although all large weights of the stack are in the first one."""
    weight, gram = (tensor.double() for tensor in make_layer(30, 48, tokens=200))
    weight[:12] *= 10
    rows = [12, 18]
    mask = torch.cat([choose_support(part, 0.1, structured=structured) for part in weight.split(rows)])
    scale, zero_point, _ = fit_grid(weight.masked_fill(mask, 0), Grid(3))
    scale, zero_point = scale.double(), zero_point.double()
    settings_ = {"support": mask, "rows": rows, "structured": structured, "precision": "float64", "sweeps": 2}
    optimizer = AlternatingDescent(
        [nn.Parameter(weight.clone())], gram.clone(), Grid(3), scale, zero_point, **settings_
    )
    for _ in range(2):
        optimizer.step()
    codes, *_, sparse = optimizer.result()
    assert sparse is not None
    each = [part.split(rows) for part in (weight, mask, scale, zero_point, codes, sparse)]
    for part, support, its_scale, its_zero_point, its_codes, its_sparse in zip(*each, strict=True):
        expected, outliers = reference_algorithm3(part, support, gram, its_scale, its_zero_point, 2, structured)
        assert int((its_sparse != 0).sum()) == int(support.sum())
        assert torch.equal(its_codes.double(), expected)
        torch.testing.assert_close(its_sparse, outliers, rtol=2e-3, atol=1e-4)  # its step is 0.1 % shorter


def test_alternating_descent_keeps_best_iterate_of_each_linear() -> None:
    """Linears in a stack get what they get alone, whichever iterate is the best of each."""
    weight, gram = (tensor.double() for tensor in make_layer(30, 48, tokens=200))
    rows, found = [12, 18], []
    mask = torch.cat([choose_support(part, 0.1) for part in weight.split(rows)])
    scale, zero_point, _ = fit_grid(weight.masked_fill(mask, 0), Grid(2))
    for part, its_rows in ((slice(0, 30), rows), (slice(0, 12), [12]), (slice(12, 30), [18])):
        grid = (scale[part], zero_point[part])
        settings_ = {"support": mask[part], "rows": its_rows, "precision": "float64", "sweeps": 12}
        optimizer = AlternatingDescent([nn.Parameter(weight[part].clone())], gram.clone(), Grid(2), *grid, **settings_)
        for _ in range(12):
            optimizer.step()
        codes, *_, sparse = optimizer.result()
        assert sparse is not None
        found.append((codes, sparse))
    assert torch.equal(found[0][0], torch.cat([found[1][0], found[2][0]]))
    torch.testing.assert_close(found[0][1], torch.cat([found[1][1], found[2][1]]))
