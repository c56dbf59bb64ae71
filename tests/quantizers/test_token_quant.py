# SPDX-License-Identifier: Apache-2.0
"""Quantization of tokens fused on CUDA: the bits of the torch version, gradients near float64, any layout."""

import pytest
import torch
from torch import Tensor

from omniq.kernels.fused import is_fused, layout_of, packed
from omniq.quantizers.activations import quantize_tokens, quantize_tokens_reference
from tests.helpers.token_quant import paper, tokens

# c channels of heads, of a SmolLM2, of inputs of LLaMA-7B's linears, of 70B's, of one that is walked along
SHAPES = [(2, 3, 40, 64), (3, 5, 128), (5, 100), (2, 17, 576), (1, 37, 4096), (3, 11008), (2, 3, 28672), (2, 1)]


def odd_tokens(*shape: int, dtype: torch.dtype) -> Tensor:
    """Also tokens of zeros, of one sign, with ties at an extreme and with a range below half precision's normal one."""
    x = tokens(*shape, dtype=dtype).flatten(0, -2)
    for row, change in enumerate((lambda t: 0 * t, torch.abs, lambda t: -t.abs(), lambda t: t.clamp(-0.5, 0.25))):
        if row < len(x):
            x[row] = change(x[row])
    x[-1] *= 1e-6
    return x.view(shape)


def step(form: object, x: Tensor, grad: Tensor, *settings: object) -> tuple[Tensor, Tensor]:
    leaf = x.detach().requires_grad_()
    out = form(leaf, *settings)  # type: ignore[operator]
    return out.detach(), torch.autograd.grad(out, leaf, grad)[0]


def test_packed_dense_rows_in_any_order_are_not_copied() -> None:
    x = torch.randn(2, 7, 4, 16)
    for view in (x, x.transpose(1, 2), x.permute(2, 0, 1, 3), x[:1], x[0], x[0, 0, 0]):
        assert packed(view) is view
    for view in (x[:, ::2], x[..., :8], x.transpose(2, 3), x.unsqueeze(1).expand(2, 3, 7, 4, 16)):
        assert packed(view).is_contiguous()
        assert torch.equal(packed(view), view)
    assert layout_of(x[:1]) == layout_of(x[0])
    assert not is_fused(x)


def test_quantize_tokens_to_dtype_converts_first() -> None:
    x, grad = tokens(3, 8, dtype=torch.float32), tokens(3, 8, seed=1, dtype=torch.float16)
    out, d_x = step(quantize_tokens, x, grad, 4, False, torch.float16)
    wanted, d_half = step(quantize_tokens, x.half(), grad, 4)
    assert torch.equal(out, wanted)
    assert torch.equal(d_x, d_half.float())


@pytest.mark.gpu
@pytest.mark.parametrize(
    ("dtype", "bits", "symmetric"),
    [(torch.float16, 4, False), (torch.float16, 6, True), (torch.float16, 8, False), (torch.bfloat16, 4, True),
     (torch.bfloat16, 8, False), (torch.float32, 8, True)],
)  # fmt: skip
@pytest.mark.parametrize("shape", SHAPES)
def test_triton_tokens_equal_torch_bits(shape: tuple[int, ...], bits: int, symmetric: bool, dtype: torch.dtype) -> None:
    x, grad = odd_tokens(*shape, dtype=dtype), tokens(*shape, seed=1, dtype=dtype)
    expected, d_expected = step(quantize_tokens_reference, x, grad, bits, symmetric)
    out, d_x = step(quantize_tokens, x.cuda(), grad.cuda(), bits, symmetric)
    assert torch.equal(out.cpu(), expected)
    # The torch version rounds three terms of a gradient one by one, the kernel their sum.
    eps = torch.finfo(dtype).eps
    torch.testing.assert_close(d_x.cpu(), d_expected, rtol=4 * eps, atol=4 * eps * d_expected.abs().max().item())


@pytest.mark.gpu
@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("shape", SHAPES)
def test_triton_tokens_gradients_are_near_float64(shape: tuple[int, ...], symmetric: bool) -> None:
    x, grad = tokens(*shape, dtype=torch.float16), tokens(*shape, seed=1, dtype=torch.float16)
    _, d_x = step(quantize_tokens, x.cuda(), grad.cuda(), 4, symmetric)
    _, exact = step(paper, x.double(), grad.double(), 4, symmetric)
    error = ((d_x.cpu().double() - exact).norm() / exact.norm()).item()
    assert error < 0.02  # steps are divided by a scale in half precision, as they will be: 0.0005 at 8 bits


@pytest.mark.gpu
@pytest.mark.parametrize("view", ["heads", "head of three", "repeated", "every other"])
def test_triton_tokens_of_any_layout_equal_torch(view: str) -> None:
    x = tokens(2, 9, 4, 64, dtype=torch.float16).cuda()
    views = {
        "heads": lambda t: t.transpose(1, 2),
        "head of three": lambda t: t[:, :, 1:2].transpose(1, 2),
        "repeated": lambda t: t.transpose(1, 2)[:, :, None].expand(2, 4, 3, 9, 64),
        "every other": lambda t: t[..., ::2],
    }
    seen = views[view](x)
    grad = torch.randn(seen.shape, device="cuda", dtype=torch.float16)
    out, d_x = step(lambda t: quantize_tokens(views[view](t), 4), x, grad)
    expected, d_expected = step(lambda t: quantize_tokens_reference(views[view](t), 4), x, grad)
    assert torch.equal(out, expected)
    torch.testing.assert_close(d_x, d_expected, rtol=1e-2, atol=1e-2)
    if view == "heads":
        assert layout_of(out) == layout_of(seen)


@pytest.mark.gpu
def test_triton_tokens_under_autocast_convert() -> None:
    x, grad = tokens(6, 4096, dtype=torch.float32).cuda(), tokens(6, 4096, seed=1, dtype=torch.float16).cuda()
    with torch.autocast("cuda", torch.float16):
        out, d_x = step(quantize_tokens, x, grad, 4, False, torch.float16)
    wanted, d_half = step(quantize_tokens, x.half(), grad, 4)
    assert torch.equal(out, wanted)
    assert d_x.dtype == torch.float32
    torch.testing.assert_close(d_x.half(), d_half, rtol=0, atol=0)


@pytest.mark.gpu
def test_triton_tokens_propagate_nan() -> None:
    x = tokens(3, 128, dtype=torch.float16).cuda()
    x[1, 5], x[2, 7] = torch.nan, torch.inf
    out = quantize_tokens(x, 4)
    assert out[0].isfinite().all()
    assert out[1, 5].isnan()
    assert out[2].isnan().all()


@pytest.mark.gpu
def test_triton_tokens_operator_passes_opcheck_and_compiles() -> None:
    x = tokens(2, 9, 64, dtype=torch.float16).cuda().requires_grad_()
    torch.library.opcheck(torch.ops.omniq.quantize_tokens.default, (x, 4, False, torch.float16))
    compiled = torch.compile(lambda x: quantize_tokens(x, 4) * 2, fullgraph=True)
    assert torch.equal(compiled(x), quantize_tokens(x, 4) * 2)
