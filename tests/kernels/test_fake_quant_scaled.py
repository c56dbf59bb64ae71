# SPDX-License-Identifier: Apache-2.0
"""Fake quantization of a weight with factors on its range: against float64, and in a training step."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from omniq.grid.affine import Grid
from omniq.kernels.fake_quant import fake_quantize
from omniq.kernels.scaled_weight import ScaledWeight
from tests.helpers.fake_quant import (
    count_wrong,
    fused_scaled,
    gradients,
    paper,
    random_factors,
    random_problem,
    relative,
    scaled,
)

FACTORS = [(True, True), (True, False), (False, True), (False, False)]


def expected(grid: Grid, groups: int, *tensors: Tensor | None) -> Tensor:
    """The paper's formula on the scaled weight; torch.amax shares among ties, clamp includes zero."""
    w, logits = scaled(*tensors[:3]), tensors[3:]
    split = w.unflatten(1, (groups, -1))
    return paper(w, split.amin(-1).clamp(max=0), split.amax(-1).clamp(min=0), *logits, grid.bits, grid.symmetric)


def both(
    form: object, tensors: list[Tensor | None], grad: Tensor, *before: object
) -> tuple[Tensor, list[Tensor | None]]:
    """Result and gradients, None where there is no tensor."""
    there = [tensor for tensor in tensors if tensor is not None]

    def call(*leaves: Tensor) -> Tensor:
        left = iter(leaves)
        return form(*before, *(None if tensor is None else next(left) for tensor in tensors))  # type: ignore[operator]

    return gradients(call, there, grad)


@settings(max_examples=40, deadline=None)
@given(
    bits=st.integers(2, 8),
    symmetric=st.booleans(),
    groups=st.integers(1, 3),
    size=st.integers(1, 9),
    rows=st.integers(1, 3),
    kind=st.sampled_from(["normal", "positive", "negative", "zero"]),
    which=st.sampled_from(FACTORS),
    seed=st.integers(0, 1000),
)
def test_scaled_weight_values_and_gradients_equal_paper(
    bits: int, symmetric: bool, groups: int, size: int, rows: int, kind: str, which: tuple[bool, bool], seed: int
) -> None:
    grid = Grid(bits, size, symmetric)
    w, _, _, *logits = random_problem(rows, groups * size, grid, seed, kind=kind)
    tensors = [w, *random_factors(rows, groups * size, *which, seed), *logits]
    grad = torch.randn(w.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    out, actual = both(fused_scaled, tensors, grad, grid)
    wanted, grads = both(expected, tensors, grad, grid, groups)
    torch.testing.assert_close(out, wanted, rtol=1e-9, atol=1e-12)
    for mine, theirs in zip(actual, grads, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("which", FACTORS)
@pytest.mark.parametrize("symmetric", [False, True])
def test_scaled_weight_equal_extremes_share_gradient(symmetric: bool, which: tuple[bool, bool]) -> None:
    grid = Grid(3, 16, symmetric)
    w, _, _, up, low = random_problem(4, 32, grid)
    rows, columns = random_factors(4, 32, *which)
    w[0, 3] = w[0, 5] = 0.5 * w[0, 0].sign()
    w[1, 16:20] = 0
    w[2] = w[2].abs()
    w[2, 16:18] = w[3] = 0
    if columns is not None:
        columns[3] = columns[5]
    grad = torch.randn(4, 32, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    out, actual = both(fused_scaled, [w, rows, columns, up, low], grad, grid)
    wanted, grads = both(expected, [w, rows, columns, up, low], grad, grid, 2)
    assert relative(out, wanted) < 1e-12
    for mine, theirs in zip(actual, grads, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-9, atol=1e-12)


def test_scaled_half_weights_compute_in_float32_and_save_only_inputs_and_range() -> None:
    grid = Grid(4, 16)
    w, _, _, up, low = (t.float() for t in random_problem(8, 64, grid))
    rows, columns = (t.float().requires_grad_() for t in random_factors(8, 64, True, True))
    weight, saved = ScaledWeight(w.half(), rows, columns), []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        out = fake_quantize(weight, up, low, grid)
    assert out.dtype == torch.float16
    assert sum(t.numel() * t.element_size() for t in saved) == 2 * w.numel() + 4 * (8 + 64) + 4 * 4 * up.numel()
    exact = fake_quantize(ScaledWeight(w.half().float(), rows, columns), up, low, grid)
    assert torch.equal(out, exact.half())
    out.sum().backward()
    assert rows.grad.dtype == columns.grad.dtype == torch.float32
    assert w.grad is up.grad is None


def test_scaled_weight_chunked_rows_equal_unchunked(monkeypatch: pytest.MonkeyPatch) -> None:
    grid = Grid(3, 16)
    w, _, _, *logits = (t.float() for t in random_problem(10, 64, grid))
    tensors = [w, *(t.float() for t in random_factors(10, 64, True, True)), *logits]
    grad = torch.randn(10, 64, generator=torch.Generator().manual_seed(0))
    out, grads = both(fused_scaled, tensors, grad, grid)
    monkeypatch.setattr("omniq.kernels.fake_quant_torch._CHUNK", 3 * 64)
    again, parts = both(fused_scaled, tensors, grad, grid)
    for a, b in zip([out, *grads], [again, *parts], strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-8)  # sigmoids and the order of sums depend on the shape


def test_operator_with_factors_passes_opcheck_and_compiles() -> None:
    grid = Grid(3, 16)
    w, _, _, *logits = (t.float().requires_grad_() for t in random_problem(4, 32, grid))
    rows, columns = (t.float().requires_grad_() for t in random_factors(4, 32, True, True))
    operator = torch.ops.omniq.fake_quantize.default
    absent = torch.empty(0)
    torch.library.opcheck(operator, (w, rows, columns, absent, absent, *logits, 3, False, torch.float32))
    torch.library.opcheck(operator, (w.detach(), rows, absent, absent, absent, *logits, 3, False, torch.float16))
    compiled = torch.compile(
        lambda: fused_scaled(grid, w, rows, columns, *logits) * 2, fullgraph=True, backend="aot_eager"
    )
    assert torch.equal(compiled(), fused_scaled(grid, w, rows, columns, *logits) * 2)


@pytest.mark.gpu
@pytest.mark.parametrize(
    ("dtype", "symmetric", "which"),
    [(torch.float16, False, (True, True)), (torch.bfloat16, True, (True, True)), (torch.float32, False, (True, False)),
     (torch.float16, True, (False, True)), (torch.bfloat16, False, (False, False))],
)  # fmt: skip
@pytest.mark.parametrize(
    ("bits", "size", "o", "i"), [(3, 16, 33, 96), (4, 192, 700, 576), (8, 100, 5, 300), (4, -1, 900, 4096),
                                 (4, 128, 300, 4096), (6, -1, 9, 5120), (3, -1, 270, 11008), (2, -1, 3, 28672),
                                 (4, -1, 2, 40000)]
)  # fmt: skip
def test_triton_scaled_weight_equals_float64(
    bits: int, size: int, o: int, i: int, dtype: torch.dtype, symmetric: bool, which: tuple[bool, bool]
) -> None:
    grid = Grid(bits, size, symmetric)
    w, *_, up, low = random_problem(o, i, grid)
    w[0, 1] = w[0, 2] = 2 * w.abs().max()
    w = w.to(dtype).double()
    tensors = [w, *(t if t is None else t.float().double() for t in (*random_factors(o, i, *which), up, low))]
    grad = torch.randn(o, i, generator=torch.Generator().manual_seed(1)).to(dtype)
    _, grads = both(fused_scaled, tensors, grad.double(), grid)
    device = [w.to("cuda", dtype), *(t if t is None else t.to("cuda", torch.float32) for t in tensors[1:])]
    out, actual = both(fused_scaled, device, grad.cuda(), grid)
    full = scaled(*tensors[:3])
    # The scaled weight and its range have two more roundings than ``count_wrong`` counts: a fourth of its margin.
    assert count_wrong(out.cpu(), full, *grid.range(full), *tensors[3:], bits, symmetric) == 0
    coarse = {torch.float16: 1e-3, torch.bfloat16: 5e-3, torch.float32: 1e-5}
    for mine, theirs in zip(actual, grads, strict=True):
        # A code that turns over moves a sum, which may nearly cancel, by one step of the grid; rounding by its dtype.
        assert relative(mine.cpu(), theirs) < coarse[mine.dtype] + 1e-2
    again, repeated = both(fused_scaled, device, grad.cuda(), grid)
    assert torch.equal(again, out)
    assert all(torch.equal(a, b) for a, b in zip(repeated, actual, strict=True))


@pytest.mark.gpu
def test_triton_scaled_weight_propagates_nan() -> None:
    grid = Grid(4, -1)
    w, *_, up, low = (t.float().cuda() for t in random_problem(4, 64, grid))
    rows, columns = (t.float().cuda() for t in random_factors(4, 64, True, True))
    rows[1] = torch.nan
    out = fake_quantize(ScaledWeight(w.half(), rows, columns), up, low, grid)
    assert out[1].isnan().all()
    assert out[[0, 2, 3]].isfinite().all()
