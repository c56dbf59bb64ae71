# SPDX-License-Identifier: Apache-2.0
"""Weights of tokens relative to their size, in losses, searches and Gram matrices."""

from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from omniq.calibration.gram import GramModule
from omniq.calibration.second_moments import input_grams, input_second_moments
from omniq.calibration.task import BlockTask
from omniq.calibration.token_weights import relative_weights, weighted_error
from omniq.grid.affine import Grid
from omniq.quantizers.clipping import LWC, Searched
from omniq.stages import OmniQuant, QuantEase
from tests.helpers.stages import fitted, losses, tiny_task

GRID = Grid(3, 16)


def with_a_massive_token(samples: int = 4) -> BlockTask:
    """The first token of every sample a hundred times larger than the others, in and out of the block."""
    task = tiny_task(GRID, samples=samples)
    task.inputs[:, 0] *= 100
    task.targets[:, 0] *= 100
    return task


@given(st.integers(1, 3), st.integers(1, 5), st.integers(1, 8), st.integers(0, 2**31))
@settings(max_examples=20, deadline=None)
def test_weighted_error_relative_ignores_size_of_token(b: int, t: int, h: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    target, noise = (torch.randn(b, t, h, generator=generator) for _ in range(2))
    output = target + 0.1 * noise
    sizes = torch.exp(3 * torch.randn(b, t, 1, generator=generator))
    plain = ((output - target).double() ** 2).mean(-1) / (target.double() ** 2).mean(-1)
    for factor in (torch.ones(1), sizes):
        ours = weighted_error(output * factor, target * factor, "relative")
        assert ours.item() == pytest.approx(plain.mean().item(), rel=1e-4)
    uniform = weighted_error(output, target, "uniform")
    assert uniform.item() == pytest.approx(((output - target).double() ** 2).mean().item(), rel=1e-5)


def test_relative_weights_of_zero_token_are_finite() -> None:
    assert torch.isfinite(relative_weights(torch.zeros(2, 3, 4))).all()
    assert torch.isfinite(weighted_error(torch.zeros(1, 3, 4), torch.zeros(1, 3, 4), "relative"))


def test_second_moments_and_grams_weigh_tokens_alike() -> None:
    task = with_a_massive_token()
    weights = 1 / task.targets.double().square().mean(-1).flatten()
    x = task.inputs.double()
    normed = x / (x.square().mean(-1, keepdim=True) + task.block.input_layernorm.variance_epsilon).sqrt()
    rows = (normed * task.block.input_layernorm.weight.double()).flatten(0, 1)
    gram = (rows * weights.unsqueeze(1)).t() @ rows / len(rows)
    name = task.layout.groups[0][0]
    ours = input_grams(task, "relative")[name]
    assert (ours - gram).norm() < 1e-5 * gram.norm()
    diagonal = input_second_moments(task, "relative")[name]
    assert (diagonal - gram.diagonal()).norm() < 1e-5 * gram.diagonal().norm()
    assert not torch.allclose(diagonal, input_second_moments(task)[name])


def test_omniquant_searched_start_weighs_tokens_as_loss_does() -> None:
    task, name, clipping = with_a_massive_token(), "self_attn.q_proj", LWC(initial=Searched())
    module = OmniQuant(clipping=clipping, token_weights="relative").module(task)
    weight = task.linear(name).weight
    relative, uniform = (
        clipping.build(weight, GRID, input_second_moments(task, kind)[name])
        for kind in ("relative", "uniform")  # type: ignore[arg-type]
    )
    assert torch.equal(module.clip(name).start, relative.start)
    assert not torch.equal(relative.start, uniform.start)


def test_quantease_gram_matrix_is_weighted_by_tokens(tmp_path: Path) -> None:
    found: dict[str, Any] = {}

    class Looking(QuantEase):
        def module(self, task: BlockTask) -> Any:
            module = super().module(task)
            solve = module.solve

            def look(k: int, stack: Any, gram: torch.Tensor, step: int) -> Any:
                found.setdefault(k, gram.clone())
                return solve(k, stack, gram, step)

            module.solve = look  # type: ignore[method-assign]
            return module

    task = with_a_massive_token()
    module = fitted(Looking(sweeps=1, token_weights="relative"), task, tmp_path)
    assert isinstance(module, GramModule)
    tokens = task.inputs.shape[0] * task.inputs.shape[1]
    expected = input_grams(task, "relative")[task.layout.groups[0][0]] * tokens
    assert (found[0] - expected).norm() < 1e-5 * expected.norm()


def test_omniquant_relative_weights_lower_error_of_ordinary_tokens(tmp_path: Path) -> None:
    """One token is a hundred times larger than the others and dominates the uniform loss."""
    errors = {}
    for kind in ("uniform", "relative"):
        task = with_a_massive_token()
        clipping = LWC(initial=Searched())
        stage = OmniQuant(epochs=15, clipping=clipping, clipping_lr=3e-2, token_weights=kind)  # type: ignore[arg-type]
        module = fitted(stage, task, tmp_path / kind)
        with torch.no_grad():
            outputs = module(task.inputs)
        ordinary = slice(1, None)
        errors[kind] = weighted_error(outputs[:, ordinary], task.targets[:, ordinary], "uniform").item()
    assert errors["relative"] < errors["uniform"]


def test_omniquant_augmented_relative_loss_equals_sum_of_both_errors(tmp_path: Path) -> None:
    task = with_a_massive_token(samples=1)
    stage = OmniQuant(epochs=1, augmented_loss=True, token_weights="relative")
    module = stage.module(task)
    with torch.no_grad():
        output = module(task.inputs).double()
    own, target = task.run(task.inputs).double(), task.targets.double()
    power = ((own + target) / 2).square().mean(-1)
    both = sum((((y - output) ** 2).mean(-1) / power).mean() for y in (own, target))
    fitted(stage, with_a_massive_token(samples=1), tmp_path)
    assert losses(tmp_path)[0] == pytest.approx(float(both), rel=1e-4)
