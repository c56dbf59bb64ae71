# SPDX-License-Identifier: Apache-2.0
"""The guard: after a non-finite loss or gradient a block goes back, slows down, and in the end keeps its first grid."""

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import Callback
from plain_omniquant import Plain, Rates, assert_losses
from stages import Stop, fit, losses, tiny_task
from torch import Tensor
from torch.utils._pytree import tree_map_only

from omniq.quantizers.grid import Grid
from omniq.stages import OmniQuant
from omniq.stages.base import BlockTask
from omniq.stages.omniquant import OmniQuantModule


class Broken(OmniQuantModule):
    """Its loss, or only its gradient, is not a number at certain steps."""

    def __init__(self, task: BlockTask, settings: OmniQuant, steps: set[int], gradient_only: bool = False) -> None:
        super().__init__(task, settings)
        self.broken_steps, self.gradient_only = steps, gradient_only

    def loss(self, inputs: Tensor, targets: Tensor) -> Tensor:
        loss = super().loss(inputs, targets)
        if self.batches.position not in self.broken_steps:
            return loss
        if not self.gradient_only:
            return loss * math.nan
        return loss + (next(self.parameters()) * 0).sqrt().sum()  # finite, its derivative is not


class Poison(Callback):
    """Makes a learned value NaN before a step, in place: a captured step sees that, too."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_train_batch_start(self, trainer: L.Trainer, module: L.LightningModule, batch: Any, batch_idx: int) -> None:
        if batch_idx == self.step:
            next(module.parameters()).data.fill_(math.nan)


class Captured(Callback):
    """Lets the step become a CUDA graph, or not."""

    def __init__(self, graph: bool) -> None:
        self.graph = graph

    def on_train_start(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        assert isinstance(module, OmniQuantModule)
        module.step.enabled = self.graph


@pytest.mark.parametrize("gradient_only", [False, True])
def test_guard_returns_to_the_last_good_pass_at_half_the_rate(tmp_path: Path, gradient_only: bool) -> None:
    """Pass 2 of 4 goes wrong: passes 3 and 4 go on from the end of pass 1, optimizer state included."""
    task, rates = tiny_task(Grid(3, 16)), Rates()
    plain = Plain(task)
    module = fit(Broken(task, OmniQuant(epochs=4), {5}, gradient_only), tmp_path, rates)
    assert rates.seen == pytest.approx([1e-2] * 6 + [5e-3] * 6)
    first, others = plain.train([0, 1, 2]), plain.train([0, 1, 2] * 2, 5e-3)
    assert_losses(losses(tmp_path)[:3] + losses(tmp_path)[6:], first + others)
    plain.assert_equals(module)
    assert task.notes["guard"] == "non-finite loss in 1 pass(es): learning rate x 0.5"


def test_guard_tells_the_module_that_its_state_is_another(tmp_path: Path) -> None:
    """Once for each return, with the state and the rate of the next step in place."""
    module, seen = Broken(tiny_task(Grid(3, 16)), OmniQuant(epochs=4), {5}), []

    def restored() -> None:
        finite = all(bool(value.isfinite().all()) for value in module.parameters())
        seen.append((finite, module.trainer.optimizers[0].param_groups[0]["lr"]))

    module.restored = restored
    fit(module, tmp_path)
    assert seen == [(True, 5e-3)]


@pytest.mark.gpu
def test_guard_goes_back_under_a_captured_step_as_under_an_eager_one(tmp_path: Path) -> None:
    """The graph of the bad passes reads moments and a rate that are not the optimizer's any more."""
    found = []
    for graph in (False, True):
        task = tiny_task(Grid(3, 16))
        task.block.cuda()
        task = replace(
            task,
            inputs=task.inputs.cuda(),
            targets=task.targets.cuda(),
            kwargs=tree_map_only(Tensor, Tensor.cuda, task.kwargs),
        )
        module = OmniQuant(epochs=6).module(task)
        folder = tmp_path / str(graph)
        fit(module, folder, Captured(graph), Poison(7), accelerator="gpu", devices=1)
        assert task.notes["guard"] == "non-finite loss in 1 pass(es): learning rate x 0.5"
        found.append(losses(folder))
    eager, captured = found
    assert captured[9:] == pytest.approx(eager[9:], rel=1e-3)


def test_guard_keeps_to_the_schedule(tmp_path: Path) -> None:
    """Under a decaying rate, half of what the schedule says now, not of what it said before the bad pass."""
    rates = Rates()
    fit(Broken(tiny_task(Grid(3)), OmniQuant(epochs=3, schedule="cosine"), {5}), tmp_path, rates)
    expected = [1e-2 * (1 + math.cos(math.pi * step / 9)) / 2 for step in range(9)]
    assert rates.seen == pytest.approx(expected[:6] + [rate / 2 for rate in expected[6:]])


def test_guard_gives_up_after_three_passes(tmp_path: Path) -> None:
    """The block gets the grid it started with, and its summary says so; the remaining passes are not made."""
    task = tiny_task(Grid(3, 16))
    start = OmniQuant().module(task).finish()
    module = fit(Broken(task, OmniQuant(epochs=9), {4, 7, 12}), tmp_path)
    assert len(losses(tmp_path)) == 12
    assert task.notes["guard"] == "non-finite loss in 3 passes: kept the initial grid"
    assert all((clip.upper == 4).all() and (clip.lower == 4).all() for clip in map(module.clip, task.family.linears))
    for name, linear in task.result.linears.items():
        assert torch.equal(linear.codes, start.linears[name].codes)
        assert torch.equal(linear.scale, start.linears[name].scale)


@pytest.mark.parametrize("killed_at", [4, 7, 10])
@pytest.mark.parametrize("bad", [{5}, {5, 8}, {2, 5, 8}])
def test_guard_survives_a_resume(tmp_path: Path, bad: set[int], killed_at: int) -> None:
    """What it did before an interruption still holds, and is still told."""
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    tasks = []
    for folder in (whole, parts):
        folder.mkdir()
        tasks.append(tiny_task(Grid(3, 16)))
    settings = OmniQuant(epochs=5, schedule="cosine")
    expected = fit(Broken(tasks[0], settings, bad), whole)
    try:
        found = fit(Broken(tasks[1], settings, bad), parts, Stop(killed_at))
    except RuntimeError as error:
        if str(error) != "stopped by the test":
            raise
        tasks[1] = tiny_task(Grid(3, 16))
        found = fit(Broken(tasks[1], settings, bad), parts, resume=True)
    assert tasks[1].notes == tasks[0].notes
    assert (parts / "losses.csv").read_bytes() == (whole / "losses.csv").read_bytes()
    for name, value in expected.state_dict().items():
        assert torch.equal(found.state_dict()[name], value)
