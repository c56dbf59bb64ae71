# SPDX-License-Identifier: Apache-2.0
"""The KL divergence of two models, computed in chunks, equals the whole of it in float64."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from omniq.calibration import distillation
from omniq.calibration.distillation import divergence


def head_of(width: int, vocabulary: int, seed: int = 0) -> nn.Module:
    """A norm and a projection, as after the last block."""
    generator = torch.Generator().manual_seed(seed)
    head = nn.Sequential(nn.LayerNorm(width), nn.Linear(width, vocabulary, bias=False)).requires_grad_(False)
    head[0].bias.copy_(0.1 * torch.randn(width, generator=generator))
    head[1].weight.copy_(2 * torch.randn(vocabulary, width, generator=generator))
    return head


def states(*shape: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Hidden states of two models, near each other."""
    generator = torch.Generator().manual_seed(seed)
    targets = torch.randn(*shape, generator=generator)
    return targets + 0.3 * torch.randn(*shape, generator=generator), targets


def reference(hidden: Tensor, targets: Tensor, head: nn.Module) -> tuple[Tensor, Tensor]:
    """The loss and its gradient in float64, on all logits at once, from probabilities."""
    norm, projection = (head[0].weight.double(), head[0].bias.double()), head[1].weight.double()

    def probabilities(x: Tensor) -> Tensor:
        centred = x - x.mean(-1, keepdim=True)
        normed = centred / (centred.square().mean(-1, keepdim=True) + 1e-5).sqrt() * norm[0] + norm[1]
        powers = (normed @ projection.T).exp()
        return powers / powers.sum(-1, keepdim=True)

    student = hidden.detach().double().requires_grad_()
    p, q = probabilities(targets.double()), probabilities(student)
    loss = (p * (p / q).log()).sum(-1).mean()
    return loss.detach(), torch.autograd.grad(loss, student)[0]


@settings(max_examples=40, deadline=None)
@given(
    samples=st.integers(1, 3),
    tokens=st.integers(1, 5),
    vocabulary=st.integers(2, 17),
    chunk=st.integers(1, 100),
    seed=st.integers(0, 10),
)
def test_divergence_and_gradient_equal_float64_whole(
    samples: int, tokens: int, vocabulary: int, chunk: int, seed: int
) -> None:
    """For any chunk: less than one row, one row, several with a remainder, all."""
    head, (hidden, targets) = head_of(6, vocabulary, seed), states(samples, tokens, 6, seed=seed)
    wanted, gradient = reference(hidden, targets, head)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(distillation, "CHUNK", chunk)
        loss = divergence(hidden.requires_grad_(), targets, head, vocabulary)
    (3 * loss).backward()
    assert loss.item() == pytest.approx(wanted.item(), rel=1e-4, abs=1e-6)
    assert hidden.grad is not None
    assert hidden.grad.shape == hidden.shape
    assert (hidden.grad.double() - 3 * gradient).norm() < 1e-4 * gradient.norm() + 1e-6


def test_divergence_holds_no_more_logits_than_chunk(monkeypatch: pytest.MonkeyPatch) -> None:
    head, (hidden, targets), sizes = head_of(6, 10), states(2, 7, 6), []
    monkeypatch.setattr(distillation, "CHUNK", 45)

    def recorded(x: Tensor) -> Tensor:
        logits: Tensor = head(x)
        sizes.append(logits.numel())
        return logits

    divergence(hidden.requires_grad_(), targets, recorded, 10).backward()
    assert max(sizes) == 40  # four rows of ten
    assert sum(sizes) == 2 * 14 * 10  # each row once for either model


def test_divergence_of_equal_states_is_zero() -> None:
    head, (hidden, _) = head_of(6, 10), states(2, 7, 6)
    loss = divergence(hidden.requires_grad_(), hidden.detach(), head, 10)
    loss.backward()
    assert loss.item() == 0
    assert hidden.grad is not None
    assert hidden.grad.abs().max() < 1e-6


def test_divergence_without_gradient_runs_head_without_graph() -> None:
    head, (hidden, targets), graphs = head_of(6, 10), states(2, 7, 6), []

    def recorded(x: Tensor) -> Tensor:
        logits: Tensor = head(x)
        graphs.append(logits.requires_grad)
        return logits

    loss = divergence(hidden, targets, recorded, 10)
    assert not loss.requires_grad
    assert graphs == [False, False]
    with torch.no_grad():
        assert divergence(hidden.requires_grad_(), targets, head, 10).item() == loss.item()


def test_divergence_under_autocast_equals_float64_of_rounded_head() -> None:
    """Products are in bfloat16, softmax and sums in float32."""
    head, (hidden, targets) = head_of(6, 10), states(2, 7, 6)
    wanted, gradient = reference(hidden, targets, head)
    with torch.autocast("cpu", torch.bfloat16):
        loss = divergence(hidden.requires_grad_(), targets, head, 10)
        loss.backward()
    assert loss.dtype == torch.float32
    assert loss.item() == pytest.approx(wanted.item(), rel=0.1)
    assert hidden.grad is not None
    error = (hidden.grad.double() - gradient).norm() / gradient.norm()
    assert error < 0.1
