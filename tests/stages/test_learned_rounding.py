# SPDX-License-Identifier: Apache-2.0
"""Learned rounding trains codes, scales and norms against the output of the block."""

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.func import functional_call
from torch.utils._pytree import tree_map

from omniq.blocks.forward import call_block
from omniq.blocks.weights import load_quantized_weights
from omniq.calibration.captured_step import OptimizerStep
from omniq.calibration.task import BlockTask
from omniq.errors import UserError
from omniq.grid.affine import Grid
from omniq.quantizers.clipping import Searched
from omniq.stages import RTN, LearnedRounding, QuantEase
from omniq.stages.modules.learned_rounding import MARGIN, LearnedRoundingModule
from omniq.storage.block_result import BlockResult
from tests.helpers.stages import Stop, fit, fitted, losses, tiny_task

GRID = Grid(2, 16)


def rounded(folder: Path, grid: Grid = GRID, samples: int = 4) -> BlockTask:
    """A tiny block with the codes of a round-to-nearest stage."""
    return fitted(RTN(clipping=Searched()), tiny_task(grid, samples=samples), folder / "rtn").task


def error(task: BlockTask, result: BlockResult) -> float:
    """Mean squared error of the deployed block against the targets, float64."""
    block = copy.deepcopy(task.block)
    load_quantized_weights(block, result)
    with torch.no_grad():
        return (call_block(block, task.inputs, task.kwargs) - task.targets).double().square().mean().item()


def test_learned_rounding_lowers_error_of_earlier_stage(tmp_path: Path) -> None:
    task = rounded(tmp_path)
    assert task.result is not None
    before = task.result
    after = fitted(LearnedRounding(epochs=30, rounding_lr=2e-2, scale_lr=5e-3), task, tmp_path / "tuned").task.result
    assert after is not None
    assert error(task, after) < 0.7 * error(task, before)
    assert any((after.linears[name].codes != before.linears[name].codes).any() for name in after.linears)
    for name, linear in after.linears.items():
        assert torch.equal(linear.zero_point, before.linears[name].zero_point)
        assert int(linear.codes.max()) <= GRID.max_code


def test_learned_rounding_last_loss_equals_deployed_error(tmp_path: Path) -> None:
    task = rounded(tmp_path, samples=1)
    module = fit(LearnedRounding(epochs=5, norm_lr=1e-3).module(task), tmp_path / "tuned")
    assert isinstance(module, LearnedRoundingModule)
    result = task.result
    assert result is not None
    with torch.no_grad():
        ours = module.loss(task.inputs, task.targets).item()
    assert ours == pytest.approx(error(task, result), rel=2e-3)  # scales are stored in float16
    assert not torch.equal(result.tensors["input_layernorm.weight"], task.block.input_layernorm.weight)


@pytest.mark.parametrize("rates", [{"rounding_lr": 0.0, "scale_lr": 5e-3}, {"rounding_lr": 2e-2, "scale_lr": 0.0}])
def test_learned_rounding_zero_rate_keeps_that_part(tmp_path: Path, rates: dict[str, Any]) -> None:
    task = rounded(tmp_path)
    before = task.result
    after = fitted(LearnedRounding(epochs=10, **rates), task, tmp_path / "tuned").task.result
    assert before is not None
    assert after is not None
    for name, linear in after.linears.items():
        assert torch.equal(linear.codes, before.linears[name].codes) == (rates["rounding_lr"] == 0)
        assert torch.equal(linear.scale, before.linears[name].scale) == (rates["scale_lr"] == 0)


def plain_gradients(task: BlockTask, module: LearnedRoundingModule, name: str) -> tuple[Tensor, Tensor]:
    """Gradients of positions and log scales in float64, straight-through written with ``detach``."""
    block = copy.deepcopy(task.block).double()
    rotary = {"position_embeddings": tuple(part.double() for part in task.kwargs["position_embeddings"])}
    assert task.result is not None
    weights, leaves = {}, {}
    for each, start in task.result.linears.items():
        position = module.codes(each).position.detach().double().requires_grad_()
        log_scale = torch.zeros(start.scale.shape, dtype=torch.float64, requires_grad=True)
        codes = position + (position.round().clamp(0, start.grid.max_code) - position).detach()
        groups = codes.unflatten(1, (start.scale.shape[1], -1)) - start.zero_point.double().unsqueeze(-1)
        scaled = groups * (start.scale.double() * log_scale.exp()).unsqueeze(-1)
        weights[f"{each}.weight"] = scaled.flatten(1)
        leaves[each] = (position, log_scale)
    output = functional_call(block, weights, (task.inputs.double(),), {**task.kwargs, **rotary})
    output = output[0] if isinstance(output, tuple) else output
    grads = torch.autograd.grad((output - task.targets.double()).square().mean(), leaves[name])
    return grads[0], grads[1]


def test_learned_rounding_gradients_equal_float64_autograd(tmp_path: Path) -> None:
    task = rounded(tmp_path)
    module = LearnedRounding().module(task)
    module.parameter_groups()
    module.loss(task.inputs, task.targets).backward()
    for name in ("self_attn.q_proj", "mlp.down_proj"):
        position, log_scale = plain_gradients(task, module, name)
        codes = module.codes(name)
        ends = (codes.first <= 0) | (codes.first >= GRID.max_code)
        assert codes.position.grad is not None
        assert codes.log_scale.grad is not None
        free = torch.where(ends, 0, 1)
        ours, theirs = codes.position.grad * free, position * free
        assert (ours - theirs).norm() < 1e-5 * theirs.norm()
        assert (codes.log_scale.grad - log_scale).norm() < 1e-5 * log_scale.norm()
        outward = ((codes.first <= 0) & (position > 0)) | ((codes.first >= GRID.max_code) & (position < 0))
        assert (codes.position.grad[outward] == 0).all()


def test_learned_rounding_positions_start_at_codes_towards_weight(tmp_path: Path) -> None:
    task = fitted(QuantEase(sweeps=4), tiny_task(GRID, samples=4), tmp_path / "qe").task
    assert task.result is not None
    module = LearnedRounding().module(task)
    for name, linear in task.result.linears.items():
        position = module.codes(name).position
        assert torch.equal(position.round().clamp(0, GRID.max_code).to(torch.uint8), linear.codes)
        assert (position - linear.codes).abs().max() <= MARGIN + 1e-6


def test_learned_rounding_relative_augmented_loss_decreases(tmp_path: Path) -> None:
    task = rounded(tmp_path)
    settings = LearnedRounding(epochs=8, rounding_lr=2e-2, token_weights="relative", augmented_loss=True)
    fitted(settings, task, tmp_path / "tuned")
    every = losses(tmp_path / "tuned")
    assert sum(every[-4:]) < 0.9 * sum(every[:4])


def from_disk(folder: Path) -> BlockTask:
    """As a run that was interrupted has it: the result of the stage before is read."""
    task = rounded(folder)
    assert task.result is not None
    task.result.save(folder / "result.safetensors")
    task.result = BlockResult.load(folder / "result.safetensors")
    return task


@pytest.mark.parametrize("killed_at", [5, 11])
@pytest.mark.parametrize("schedule", ["cosine", "constant"])
def test_learned_rounding_killed_resumes_to_same_bits(killed_at: int, schedule: Any, tmp_path: Path) -> None:
    rates = {"rounding_lr": 2e-2, "scale_lr": 5e-3, "norm_lr": 1e-3}
    stage = LearnedRounding(epochs=3, schedule=schedule, augmented_loss=True, token_weights="relative", **rates)
    for name in ("whole", "first", "second"):
        (tmp_path / name).mkdir()
    whole = fitted(stage, rounded(tmp_path / "whole"), tmp_path / "whole").task.result
    with pytest.raises(RuntimeError, match="stopped by the test"):
        fit(stage.module(rounded(tmp_path / "first")), tmp_path / "cut", Stop(killed_at))
    found = fit(stage.module(from_disk(tmp_path / "second")), tmp_path / "cut", resume=True).task.result
    assert (tmp_path / "cut" / "losses.csv").read_bytes() == (tmp_path / "whole" / "losses.csv").read_bytes()
    assert whole is not None
    assert found is not None
    for name, linear in whole.linears.items():
        for part in ("codes", "scale", "zero_point"):
            assert torch.equal(getattr(linear, part), getattr(found.linears[name], part)), (name, part)
    assert all(torch.equal(value, found.tensors[name]) for name, value in whole.tensors.items())


@pytest.mark.gpu
def test_learned_rounding_captured_step_from_disk_equals_eager(tmp_path: Path) -> None:
    """A captured graph cannot copy from the host what a resumed run has read from its directory."""
    found = []
    for graph in (False, True):
        (tmp_path / str(graph)).mkdir()
        task = from_disk(tmp_path / str(graph))
        task.block.cuda()
        task.inputs, task.targets = task.inputs.cuda(), task.targets.cuda()
        task.kwargs = tree_map(lambda part: part.cuda() if isinstance(part, Tensor) else part, dict(task.kwargs))
        module = LearnedRounding(schedule="constant", norm_lr=1e-3).module(task)
        update = OptimizerStep(module.loss, module.configure_optimizers(), graph=graph)
        found.append([float(update(task.inputs[i % 4, None], task.targets[i % 4, None])) for i in range(9)])
    assert found[0] == pytest.approx(found[1], rel=0.02)  # a code may turn over by the order of a sum


@pytest.mark.parametrize("rates", [{}, {"rounding_lr": 0.0}, {"scale_lr": 0.0, "norm_lr": 1e-3}])
def test_learned_rounding_unlearned_parameters_require_no_gradient(rates: dict[str, float], tmp_path: Path) -> None:
    """DDP waits for the gradient of each parameter that requires one before there is an optimizer."""
    module = LearnedRounding(**rates).module(rounded(tmp_path))
    asking = [id(value) for value in module.parameters() if value.requires_grad]
    assert sorted(asking) == sorted(id(value) for group in module.parameter_groups() for value in group["params"])


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (lambda: LearnedRounding(rounding_lr=-1.0), "rounding_lr -1.0 is out of range"),
        (lambda: LearnedRounding(rounding_lr=0.0, scale_lr=0.0), "nothing to learn because all learning rates are 0"),
        (lambda: LearnedRounding(epochs=0), "LearnedRounding.epochs 0 is too small"),
        (
            lambda: LearnedRounding().check_place_in_list([]),
            "needs a preceding stage",
        ),
    ],
)
def test_learned_rounding_invalid_settings_are_refused(make: Any, says: str) -> None:
    with pytest.raises(UserError, match=says):
        make()
