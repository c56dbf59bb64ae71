# SPDX-License-Identifier: Apache-2.0
"""Fake quantization with learnable clipping on a given range: values and gradients against the paper in float64."""

from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from omniq.grid.affine import Grid
from omniq.kernels.fake_quant import clip_range, fake_quantize
from omniq.kernels.scaled_weight import ScaledWeight
from tests.helpers.fake_quant import count_wrong, fused_on, gradients, paper, random_problem, reference_on, relative

FORMS = (fused_on, reference_on)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize(("bits", "size"), [(2, 16), (3, 48), (4, -1), (8, 32)])
def test_given_range_values_and_gradients_equal_paper(
    bits: int, size: int, symmetric: bool, dtype: torch.dtype
) -> None:
    grid = Grid(bits, size, symmetric)
    tensors = [t.to(dtype) for t in random_problem(24, 96, grid)]
    grad = torch.randn(24, 96, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    expected, grads = gradients(paper, [t.double() for t in tensors], grad, bits, symmetric)
    for form in FORMS:
        out, actual = gradients(form, tensors, grad.to(dtype), grid)
        assert out.dtype == dtype
        assert relative(out, expected) < 1e-6  # measured 5e-8 in float32
        for mine, theirs in zip(actual, grads, strict=True):
            assert relative(mine, theirs) < 1e-6  # measured 5e-7 in float32


@settings(max_examples=40, deadline=None)
@given(
    bits=st.integers(2, 8),
    symmetric=st.booleans(),
    groups=st.integers(1, 3),
    size=st.integers(1, 9),
    rows=st.integers(1, 3),
    kind=st.sampled_from(["normal", "positive", "negative", "zero"]),
    spread=st.sampled_from([0.0, 1.0, 5.0]),
    seed=st.integers(0, 1000),
)
def test_given_range_any_shape_sign_and_clipping_equals_paper(
    bits: int, symmetric: bool, groups: int, size: int, rows: int, kind: str, spread: float, seed: int
) -> None:
    grid = Grid(bits, size, symmetric)
    tensors = random_problem(rows, groups * size, grid, seed, spread, kind)
    grad = torch.randn(rows, groups * size, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    expected, grads = gradients(paper, tensors, grad, bits, symmetric)
    for form in FORMS:
        out, actual = gradients(form, tensors, grad, grid)
        torch.testing.assert_close(out, expected, rtol=1e-9, atol=1e-12)
        for mine, theirs in zip(actual, grads, strict=True):
            some = torch.zeros_like(mine) if theirs is None else theirs
            torch.testing.assert_close(mine, some, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("symmetric", [False, True])
def test_given_range_all_zero_group_stays_zero_without_range_gradient(symmetric: bool) -> None:
    grid = Grid(3, 8, symmetric)
    w, lo, hi, up, low = (t.float() for t in random_problem(2, 16, grid, kind="zero"))
    out, (d_w, *d_range) = gradients(fused_on, [w, lo, hi, up, low], torch.ones(2, 16), grid)
    assert (out[0] == 0).all()
    assert torch.isfinite(d_w).all()
    assert all((d[0] == 0).all() and torch.isfinite(d).all() for d in d_range)


def test_given_range_open_logits_equal_round_to_nearest() -> None:
    """With wide-open logits this is round-to-nearest on ``Grid.fit`` (float32 scales)."""
    for symmetric in (False, True):
        grid = Grid(4, 32, symmetric, scale_dtype=torch.float32)
        w, lo, hi, *_ = (t.float() for t in random_problem(8, 64, grid))
        wide = torch.full_like(lo, 100.0)
        scale, zero = grid.fit(lo, hi)
        expected = grid.dequantize(grid.quantize(w, scale, zero), scale, zero)
        torch.testing.assert_close(fused_on(w, lo, hi, wide, wide, grid), expected, rtol=0, atol=0)
        assert all(torch.equal(a, b) for a, b in zip(clip_range(lo, hi, wide, wide), (lo, hi), strict=True))


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("kind", ["normal", "positive", "negative", "zero"])
@pytest.mark.parametrize("symmetric", [False, True])
def test_given_range_computed_from_weight_sends_gradient_to_extremes(
    symmetric: bool, kind: str, form: Callable[..., Tensor]
) -> None:
    """The gradient of a range that depends on the weight reaches the extremes; ties share it, as in torch.amax."""
    grid = Grid(3, 16, symmetric)
    w, _, _, up, low = random_problem(4, 32, grid, kind=kind)
    w[1, 3] = w[1, 5] = 0.5 * w[1, 0].sign()
    w[2, 16:20] = 0
    grad = torch.randn(4, 32, dtype=torch.float64, generator=torch.Generator().manual_seed(0))

    def actual(w: Tensor, up: Tensor, low: Tensor) -> Tensor:
        return form(w, *grid.range(w), up, low, grid)

    def expected(w: Tensor, up: Tensor, low: Tensor) -> Tensor:
        groups = w.view(-1, 16)
        lo, hi = (
            torch.clamp(end(1), **side).view(4, 2)
            for end, side in ((groups.amin, {"max": 0}), (groups.amax, {"min": 0}))
        )
        return paper(w, lo, hi, up, low, 3, symmetric)

    for (a, da), (b, db) in [(gradients(actual, [w, up, low], grad), gradients(expected, [w, up, low], grad))]:
        assert relative(a, b) < 1e-12
        for mine, theirs in zip(da, db, strict=True):
            torch.testing.assert_close(mine, theirs, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_given_range_half_weights_compute_in_float32(dtype: torch.dtype) -> None:
    grid = Grid(8, -1)
    w, lo, hi, up, low = random_problem(4, 256, grid)
    w = w.to(dtype)
    tensors = [w.float(), *(t.float() for t in (lo, hi, up, low))]
    grad = torch.randn(4, 256).to(dtype)
    expected, grads = gradients(fused_on, tensors, grad.float(), grid)
    out, actual = gradients(fused_on, [w, *tensors[1:]], grad, grid)
    assert out.dtype == dtype
    assert torch.equal(out, expected.to(dtype))
    for mine, theirs in zip(actual, grads, strict=True):
        torch.testing.assert_close(mine, theirs.to(mine.dtype), rtol=1e-6, atol=0)
    assert fake_quantize(w, *tensors[3:], grid, (tensors[1], tensors[2]), torch.float32).dtype == torch.float32


def test_given_range_backward_makes_only_needed_gradients_and_saves_only_inputs() -> None:
    grid = Grid(4, 16)
    w, lo, hi, up, low = random_problem(4, 32, grid)
    up.requires_grad_()
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t.data_ptr()) or t, lambda t: t):
        out = fused_on(w, lo, hi, up, low, grid)
    assert set(saved) <= {t.data_ptr() for t in (w, lo, hi, up, low)} | {0}  # absent factors are empty
    out.sum().backward()
    assert up.grad is not None
    assert w.grad is lo.grad is hi.grad is low.grad is None


def test_given_range_chunked_rows_equal_unchunked(monkeypatch: pytest.MonkeyPatch) -> None:
    grid = Grid(3, 16)
    tensors = [t.float() for t in random_problem(10, 64, grid)]
    grad = torch.randn(10, 64)
    whole = gradients(fused_on, tensors, grad, grid)
    monkeypatch.setattr("omniq.kernels.fake_quant_torch._CHUNK", 3 * 64)
    parts = gradients(fused_on, tensors, grad, grid)
    assert torch.equal(whole[0], parts[0])
    for a, b in zip(whole[1], parts[1], strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-9)  # the order of a sum depends on the shape


def test_given_range_compiled_step_has_no_graph_break() -> None:
    grid = Grid(3, 16)
    tensors = [t.float() for t in random_problem(4, 32, grid)]

    def step(*tensors: Tensor) -> Tensor:
        return fused_on(*tensors, grid) * 2

    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    grad = torch.randn(4, 32)
    for (a, da), (b, db) in [(gradients(step, tensors, grad), gradients(compiled, tensors, grad))]:
        assert torch.equal(a, b)
        assert all(torch.equal(x, y) for x, y in zip(da, db, strict=True))


def test_operator_with_given_range_passes_opcheck() -> None:
    grid = Grid(3, 16)
    tensors = [t.float().requires_grad_() for t in random_problem(4, 32, grid)]
    w, *others = tensors
    operands = (w, torch.empty(0), torch.empty(0), *others)
    torch.library.opcheck(torch.ops.omniq.fake_quantize.default, (*operands, 3, False, torch.float32))


@pytest.mark.gpu
@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize(
    ("bits", "size", "o", "i"), [(3, 16, 33, 96), (2, 64, 40, 576), (4, 192, 7, 576), (8, 100, 5, 300),
                                 (4, -1, 9, 5000), (3, -1, 17, 11008), (2, -1, 3, 28672), (4, 128, 256, 4096)]
)  # fmt: skip
def test_triton_given_range_equals_float64(
    bits: int, size: int, o: int, i: int, dtype: torch.dtype, symmetric: bool
) -> None:
    grid = Grid(bits, size, symmetric)
    w, lo, hi, up, low = random_problem(o, i, grid)
    w = w.to(dtype).double()
    lo, hi = grid.range(w)
    grad = torch.randn(o, i, generator=torch.Generator().manual_seed(1)).to(dtype)
    tensors = [w, lo, hi, up.float().double(), low.float().double()]
    _, grads = gradients(fused_on, tensors, grad.double(), grid)
    device = [tensors[0].to("cuda", dtype), *(t.to("cuda", torch.float32) for t in tensors[1:])]
    out, actual = gradients(fused_on, device, grad.cuda(), grid)
    assert count_wrong(out.cpu(), *tensors, bits, symmetric) == 0
    coarse = {torch.float16: 1e-3, torch.bfloat16: 5e-3, torch.float32: 1e-5}
    for mine, theirs in zip(actual, grads, strict=True):
        # A code that turns over moves a sum by one step of the grid, rounding of the result by its dtype.
        assert relative(mine.cpu(), theirs) < coarse[mine.dtype] + 3e-3
    again = gradients(fused_on, device, grad.cuda(), grid)
    assert torch.equal(again[0], out)
    assert all(torch.equal(a, b) for a, b in zip(again[1], actual, strict=True))


def eager_and_captured(step: Callable[[], list[Tensor]]) -> tuple[list[Tensor], list[Tensor]]:
    """Results of a step run eagerly, and of a replay of its CUDA graph.

    NOTE: the results are detached. Otherwise they keep the autograd nodes of the leaves, which remember the stream that
    they were made on. A backward under capture would wait for that stream, and capturing fails (see
    ``omniq.calibration.captured_step``).
    """
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        expected = [t.detach().clone() for t in step()]
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step()
    graph.replay()
    torch.cuda.synchronize()  # before the graph goes
    return expected, captured


@pytest.mark.gpu
def test_triton_given_range_in_cuda_graph_and_compiled_equals_eager() -> None:
    grid = Grid(3, 64)
    w, lo, hi, up, low = (t.to("cuda", torch.float32) for t in random_problem(64, 256, grid))
    w = w.half()
    up.requires_grad_()
    low.requires_grad_()
    grad = torch.randn(64, 256, device="cuda", dtype=torch.float16)

    def step() -> list[Tensor]:
        out = fused_on(w, lo, hi, up, low, grid)
        return [out, *torch.autograd.grad(out, (up, low), grad)]

    expected, captured = eager_and_captured(step)
    assert all(torch.equal(a, b) for a, b in zip(captured, expected, strict=True))
    compiled = torch.compile(lambda: fused_on(w, lo, hi, up, low, grid), fullgraph=True)()
    assert torch.equal(compiled, expected[0])


@pytest.mark.gpu
@pytest.mark.parametrize("symmetric", [False, True])
def test_torch_implementation_in_cuda_graph_equals_eager(symmetric: bool) -> None:
    """A GPU runs it without Triton, in float64, and for rows too long for registers. It must not synchronize."""
    grid = Grid(3, 64, symmetric)
    w, lo, hi, up, low = (t.to("cuda", torch.float64) for t in random_problem(64, 256, grid))
    grad, columns = torch.randn_like(w), torch.ones(256, device="cuda", dtype=torch.float64, requires_grad=True)
    up.requires_grad_()
    low.requires_grad_()

    def step() -> list[Tensor]:
        given = fused_on(w, lo, hi, up, low, grid)
        own = fake_quantize(ScaledWeight(w, columns=columns), up, low, grid)
        grads = torch.autograd.grad((given, own), (up, low, columns), (grad, grad))
        return [given.detach(), own.detach(), *grads]

    expected, captured = eager_and_captured(step)
    assert all(torch.equal(a, b) for a, b in zip(captured, expected, strict=True))


def test_bounds_for_weight_with_factors_are_refused() -> None:
    grid = Grid(3, 16)
    w, lo, hi, up, low = random_problem(4, 32, grid)
    with pytest.raises(ValueError, match="bounds are given for a weight with factors"):
        fake_quantize(ScaledWeight(w, columns=torch.ones(32)), up, low, grid, (lo, hi))
