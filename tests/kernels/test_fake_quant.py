# SPDX-License-Identifier: Apache-2.0
"""Fake quantization with learnable clipping: values and gradients against the paper's formula in float64."""

import itertools
from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from omniq.grid.affine import Grid
from omniq.kernels.fake_quant import clip_range, fake_quantize, fake_quantize_reference
from omniq.kernels.fake_quant_moving import fake_quantize_moving
from omniq.kernels.scaled_weight import ScaledWeight

FORMS = (fake_quantize, fake_quantize_reference)


def straight_through(value: Tensor, rounded: Tensor) -> Tensor:
    return value + (rounded - value).detach()


def paper(w: Tensor, lo: Tensor, hi: Tensor, up: Tensor, low: Tensor, bits: int, symmetric: bool) -> Tensor:
    """Group by group, as the paper writes it, in float64."""
    o, i, G = *w.shape, lo.shape[1]
    rows = []
    for r in range(o):
        for k in range(G):
            group = w[r, k * (i // G) : (k + 1) * (i // G)]
            biggest = hi[r, k] / (1 + torch.exp(-up[r, k]))
            smallest = lo[r, k] / (1 + torch.exp(-low[r, k]))
            span = 2 * torch.maximum(biggest, -smallest) if symmetric else biggest - smallest
            step = torch.clamp(span / (2**bits - 1), min=torch.finfo(torch.float64).tiny)
            zero = 2 ** (bits - 1) if symmetric else torch.round(-smallest / step).item()
            n = group / step
            code = torch.clip(straight_through(n, torch.round(n)) + zero, 0, 2**bits - 1)
            rows.append((code - zero) * step)
    return torch.cat(rows).view(o, i)


def problem(o: int, i: int, grid: Grid, seed: int = 0, spread: float = 1.0, kind: str = "normal") -> list[Tensor]:
    """Weight, range and logits in float64; ``spread`` of the logits around 1."""
    draw = torch.Generator().manual_seed(seed)
    w = torch.randn(o, i, generator=draw, dtype=torch.float64) * 0.02
    if kind == "positive":
        w = w.abs()
    if kind == "negative":
        w = -w.abs()
    if kind == "zero":
        w[0] = 0
    lo, hi = grid.range(w)
    up, low = (1 + spread * torch.randn(lo.shape, generator=draw, dtype=torch.float64) for _ in range(2))
    return [w, lo, hi, up, low]


def gradients(function, tensors: list[Tensor], grad: Tensor, *args) -> tuple[Tensor, list[Tensor]]:
    leaves = [t.detach().clone().requires_grad_() for t in tensors]
    out = function(*leaves, *args)
    return out.detach(), list(torch.autograd.grad(out, leaves, grad.to(out.dtype), allow_unused=True))


def relative(a: Tensor, b: Tensor) -> float:
    return ((a.double() - b.double()).norm() / b.double().norm().clamp(min=1e-300)).item()


# Relative error of w / s in float32, doubled: sigmoid 10 u, range, scale and quotient 5 u, with u = 2^-24.
TIE = 2.0**-19


def misses(out: Tensor, w: Tensor, lo: Tensor, hi: Tensor, up: Tensor, low: Tensor, bits: int, symmetric: bool) -> int:
    """How many values are not what float64 gives, rounded to their dtype.

    Where ``w / s`` or ``-xmin / s`` is so near to a tie that ``TIE`` turns it over, both codes are right; nowhere else.
    """
    levels = 2**bits - 1
    n = w.unflatten(1, (lo.shape[1], -1))
    biggest, smallest = (hi * up.sigmoid())[..., None], (lo * low.sigmoid())[..., None]
    step = (2 * torch.maximum(biggest, -smallest) if symmetric else biggest - smallest) / levels
    wrong = torch.ones(out.shape, dtype=torch.bool)
    for of_zero, of_code in itertools.product((1 - TIE, 1 + TIE), repeat=2):
        zero = torch.full_like(step, 2 ** (bits - 1)) if symmetric else (-smallest / step * of_zero).round()
        code = ((n / step * of_code).round() + zero).clamp(0, levels)
        right = ((code - zero) * step).flatten(1)
        ulp = torch.finfo(out.dtype).eps / 2 + TIE
        wrong &= (out.double() - right).abs() > ulp * right.abs() + 1e-7  # float16 is subnormal below 6e-5
    return int(wrong.sum())


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize(("bits", "size"), [(2, 16), (3, 48), (4, -1), (8, 32)])
def test_values_and_gradients_equal_the_paper(bits: int, size: int, symmetric: bool, dtype: torch.dtype) -> None:
    grid = Grid(bits, size, symmetric)
    tensors = [t.to(dtype) for t in problem(24, 96, grid)]
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
def test_any_shape_sign_and_clipping(
    bits: int, symmetric: bool, groups: int, size: int, rows: int, kind: str, spread: float, seed: int
) -> None:
    grid = Grid(bits, size, symmetric)
    tensors = problem(rows, groups * size, grid, seed, spread, kind)
    grad = torch.randn(rows, groups * size, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    expected, grads = gradients(paper, tensors, grad, bits, symmetric)
    for form in FORMS:
        out, actual = gradients(form, tensors, grad, grid)
        torch.testing.assert_close(out, expected, rtol=1e-9, atol=1e-12)
        for mine, theirs in zip(actual, grads, strict=True):
            some = torch.zeros_like(mine) if theirs is None else theirs
            torch.testing.assert_close(mine, some, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("symmetric", [False, True])
def test_an_all_zero_group_is_zero_and_gets_no_gradient_in_its_range(symmetric: bool) -> None:
    grid = Grid(3, 8, symmetric)
    w, lo, hi, up, low = (t.float() for t in problem(2, 16, grid, kind="zero"))
    out, (d_w, *d_range) = gradients(fake_quantize, [w, lo, hi, up, low], torch.ones(2, 16), grid)
    assert (out[0] == 0).all()
    assert torch.isfinite(d_w).all()
    assert all((d[0] == 0).all() and torch.isfinite(d).all() for d in d_range)


def test_open_clipping_covers_the_grid_of_the_weights() -> None:
    """With wide-open logits this is round-to-nearest on ``Grid.fit`` (float32 scales)."""
    for symmetric in (False, True):
        grid = Grid(4, 32, symmetric, scale_dtype=torch.float32)
        w, lo, hi, *_ = (t.float() for t in problem(8, 64, grid))
        wide = torch.full_like(lo, 100.0)
        scale, zero = grid.fit(lo, hi)
        expected = grid.dequantize(grid.quantize(w, scale, zero), scale, zero)
        torch.testing.assert_close(fake_quantize(w, lo, hi, wide, wide, grid), expected, rtol=0, atol=0)
        assert all(torch.equal(a, b) for a, b in zip(clip_range(lo, hi, wide, wide), (lo, hi), strict=True))


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("kind", ["normal", "positive", "negative", "zero"])
@pytest.mark.parametrize("symmetric", [False, True])
def test_gradient_reaches_a_moving_weight_through_its_extremes(
    symmetric: bool, kind: str, form: Callable[..., Tensor]
) -> None:
    """A range that depends on the weight hands its gradient on; ties share, as torch.amax has it."""
    grid = Grid(3, 16, symmetric)
    w, _, _, up, low = problem(4, 32, grid, kind=kind)
    w[1, 3] = w[1, 5] = 0.5 * w[1, 0].sign()
    w[2, 16:20] = 0
    grad = torch.randn(4, 32, dtype=torch.float64, generator=torch.Generator().manual_seed(0))

    def moving(w: Tensor, up: Tensor, low: Tensor) -> Tensor:
        return form(w, *grid.range(w), up, low, grid)

    def expected(w: Tensor, up: Tensor, low: Tensor) -> Tensor:
        groups = w.view(-1, 16)
        lo, hi = (
            torch.clamp(end(1), **side).view(4, 2)
            for end, side in ((groups.amin, {"max": 0}), (groups.amax, {"min": 0}))
        )
        return paper(w, lo, hi, up, low, 3, symmetric)

    for (a, da), (b, db) in [(gradients(moving, [w, up, low], grad), gradients(expected, [w, up, low], grad))]:
        assert relative(a, b) < 1e-12
        for mine, theirs in zip(da, db, strict=True):
            torch.testing.assert_close(mine, theirs, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_weights_compute_in_float32(dtype: torch.dtype) -> None:
    grid = Grid(8, -1)
    w, lo, hi, up, low = problem(4, 256, grid)
    w = w.to(dtype)
    tensors = [w.float(), *(t.float() for t in (lo, hi, up, low))]
    grad = torch.randn(4, 256).to(dtype)
    expected, grads = gradients(fake_quantize, tensors, grad.float(), grid)
    out, actual = gradients(fake_quantize, [w, *tensors[1:]], grad, grid)
    assert out.dtype == dtype
    assert torch.equal(out, expected.to(dtype))
    for mine, theirs in zip(actual, grads, strict=True):
        torch.testing.assert_close(mine, theirs.to(mine.dtype), rtol=1e-6, atol=0)
    assert fake_quantize(w, *tensors[1:], grid, out_dtype=torch.float32).dtype == torch.float32


def test_only_asked_gradients_are_made_and_only_inputs_are_saved() -> None:
    grid = Grid(4, 16)
    w, lo, hi, up, low = problem(4, 32, grid)
    up.requires_grad_()
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t.data_ptr()) or t, lambda t: t):
        out = fake_quantize(w, lo, hi, up, low, grid)
    assert set(saved) <= {t.data_ptr() for t in (w, lo, hi, up, low)}
    out.sum().backward()
    assert up.grad is not None
    assert w.grad is lo.grad is hi.grad is low.grad is None


def test_rows_in_chunks_equal_rows_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    grid = Grid(3, 16)
    tensors = [t.float() for t in problem(10, 64, grid)]
    grad = torch.randn(10, 64)
    whole = gradients(fake_quantize, tensors, grad, grid)
    monkeypatch.setattr("omniq.kernels.fake_quant_torch._CHUNK", 3 * 64)
    parts = gradients(fake_quantize, tensors, grad, grid)
    assert torch.equal(whole[0], parts[0])
    for a, b in zip(whole[1], parts[1], strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-9)  # the order of a sum depends on the shape


def test_a_compiled_step_has_no_graph_break() -> None:
    grid = Grid(3, 16)
    tensors = [t.float() for t in problem(4, 32, grid)]

    def step(*tensors: Tensor) -> Tensor:
        return fake_quantize(*tensors, grid) * 2

    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    grad = torch.randn(4, 32)
    for (a, da), (b, db) in [(gradients(step, tensors, grad), gradients(compiled, tensors, grad))]:
        assert torch.equal(a, b)
        assert all(torch.equal(x, y) for x, y in zip(da, db, strict=True))


def test_the_operator_passes_torch_own_checks() -> None:
    grid = Grid(3, 16)
    tensors = [t.float().requires_grad_() for t in problem(4, 32, grid)]
    torch.library.opcheck(torch.ops.omniq.fake_quantize.default, (*tensors, 3, False, torch.float32))


@pytest.mark.gpu
@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize(
    ("bits", "size", "o", "i"), [(3, 16, 33, 96), (2, 64, 40, 576), (4, 192, 7, 576), (8, 100, 5, 300),
                                 (4, -1, 9, 5000), (3, -1, 17, 11008), (2, -1, 3, 28672), (4, 128, 256, 4096)]
)  # fmt: skip
def test_triton_equals_float64(bits: int, size: int, o: int, i: int, dtype: torch.dtype, symmetric: bool) -> None:
    grid = Grid(bits, size, symmetric)
    w, lo, hi, up, low = problem(o, i, grid)
    w = w.to(dtype).double()
    lo, hi = grid.range(w)
    grad = torch.randn(o, i, generator=torch.Generator().manual_seed(1)).to(dtype)
    tensors = [w, lo, hi, up.float().double(), low.float().double()]
    _, grads = gradients(fake_quantize, tensors, grad.double(), grid)
    device = [tensors[0].to("cuda", dtype), *(t.to("cuda", torch.float32) for t in tensors[1:])]
    out, actual = gradients(fake_quantize, device, grad.cuda(), grid)
    assert misses(out.cpu(), *tensors, bits, symmetric) == 0
    coarse = {torch.float16: 1e-3, torch.bfloat16: 5e-3, torch.float32: 1e-5}
    for mine, theirs in zip(actual, grads, strict=True):
        # A code that turns over moves a sum by one step of the grid, rounding of the result by its dtype.
        assert relative(mine.cpu(), theirs) < coarse[mine.dtype] + 3e-3
    again = gradients(fake_quantize, device, grad.cuda(), grid)
    assert torch.equal(again[0], out)
    assert all(torch.equal(a, b) for a, b in zip(again[1], actual, strict=True))


def eager_and_captured(step: Callable[[], list[Tensor]]) -> tuple[list[Tensor], list[Tensor]]:
    """What a step gives, and what a replay of the CUDA graph of it gives.

    NOTE: a result that is not detached keeps the leaves' nodes, which remember the stream that they were made on; a
    backward under capture would then wait for that stream, and capturing fails. See omniq.calibration.captured_step.
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
def test_triton_in_a_cuda_graph_and_compiled() -> None:
    grid = Grid(3, 64)
    w, lo, hi, up, low = (t.to("cuda", torch.float32) for t in problem(64, 256, grid))
    w = w.half()
    up.requires_grad_()
    low.requires_grad_()
    grad = torch.randn(64, 256, device="cuda", dtype=torch.float16)

    def step() -> list[Tensor]:
        out = fake_quantize(w, lo, hi, up, low, grid)
        return [out, *torch.autograd.grad(out, (up, low), grad)]

    expected, captured = eager_and_captured(step)
    assert all(torch.equal(a, b) for a, b in zip(captured, expected, strict=True))
    compiled = torch.compile(lambda: fake_quantize(w, lo, hi, up, low, grid), fullgraph=True)()
    assert torch.equal(compiled, expected[0])


@pytest.mark.gpu
@pytest.mark.parametrize("symmetric", [False, True])
def test_the_torch_version_in_a_cuda_graph(symmetric: bool) -> None:
    """It is what a GPU runs without Triton, in float64, and on rows that no program can hold: nothing of it waits."""
    grid = Grid(3, 64, symmetric)
    w, lo, hi, up, low = (t.to("cuda", torch.float64) for t in problem(64, 256, grid))
    grad, columns = torch.randn_like(w), torch.ones(256, device="cuda", dtype=torch.float64, requires_grad=True)
    up.requires_grad_()
    low.requires_grad_()

    def step() -> list[Tensor]:
        still = fake_quantize(w, lo, hi, up, low, grid)
        moving = fake_quantize_moving(ScaledWeight(w, columns=columns), up, low, grid)
        grads = torch.autograd.grad((still, moving), (up, low, columns), (grad, grad))
        return [still.detach(), moving.detach(), *grads]

    expected, captured = eager_and_captured(step)
    assert all(torch.equal(a, b) for a, b in zip(captured, expected, strict=True))
