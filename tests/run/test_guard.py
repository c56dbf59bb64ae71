# SPDX-License-Identifier: Apache-2.0
"""After a non-finite loss or gradient the guard returns to a good state, lowers the rate, and at last gives up."""

import math
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import Callback
from torch import Tensor

from omniq.calibration.task import BlockTask
from omniq.callbacks.checkpoint import PassCheckpoint
from omniq.callbacks.fuse import Fuse
from omniq.callbacks.guard import NonFiniteGuard
from omniq.callbacks.losses import BlockLosses
from omniq.callbacks.progress import BlockProgress
from omniq.callbacks.settle import Settle
from omniq.cli.command import main
from omniq.errors import UserError
from omniq.grid.affine import Grid
from omniq.run.checks import check_callbacks
from omniq.run.fit import check_finite_result
from omniq.stages import GPTQ, LearnedRounding, OmniQuant
from omniq.stages.modules.omniquant import OmniQuantModule
from omniq.storage.block_result import BlockResult
from omniq.transforms.let import LET
from tests.helpers.outlier_task import outlier_task
from tests.helpers.plain_omniquant import Plain, Rates, assert_losses
from tests.helpers.runs import omniquant, write_run
from tests.helpers.stages import Stop, fit, losses, on_cuda, tiny_task


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
def test_guard_after_bad_pass_returns_to_last_good_pass_at_half_rate(tmp_path: Path, gradient_only: bool) -> None:
    """Pass 2 of 4 fails: passes 3 and 4 start from the end of pass 1, with its optimizer state."""
    task, rates = tiny_task(Grid(3, 16)), Rates()
    plain = Plain(task)
    module = fit(Broken(task, OmniQuant(epochs=4), {5}, gradient_only), tmp_path, rates)
    assert rates.seen == pytest.approx([1e-2] * 6 + [5e-3] * 6)
    first, others = plain.train([0, 1, 2]), plain.train([0, 1, 2] * 2, 5e-3)
    assert_losses(losses(tmp_path)[:3] + losses(tmp_path)[6:], first + others)
    plain.assert_equals(module)
    assert task.notes["guard"] == "non-finite loss in 1 pass(es): learning rate x 0.5"


def test_guard_module_with_empty_buffer_is_accepted(tmp_path: Path) -> None:
    """A tensor without elements has no maximum."""
    module = OmniQuant(epochs=2).module(tiny_task(Grid(3, 16)))
    module.register_buffer("nothing", torch.empty(0))
    fit(module, tmp_path)
    assert "guard" not in module.task.notes


def test_guard_after_return_calls_restored_once(tmp_path: Path) -> None:
    """The call comes when the state and the rate of the next step are in place."""
    module, seen = Broken(tiny_task(Grid(3, 16)), OmniQuant(epochs=4), {5}), []

    def restored() -> None:
        finite = all(bool(value.isfinite().all()) for value in module.parameters())
        seen.append((finite, module.trainer.optimizers[0].param_groups[0]["lr"]))

    module.restored = restored
    fit(module, tmp_path)
    assert seen == [(True, 5e-3)]


@pytest.mark.gpu
def test_guard_under_captured_step_returns_as_under_eager_step(tmp_path: Path) -> None:
    """The graph of the bad passes reads moments and a rate that the optimizer no longer has."""
    found = []
    for graph in (False, True):
        task = on_cuda(tiny_task(Grid(3, 16)))
        module = OmniQuant(epochs=6).module(task)
        folder = tmp_path / str(graph)
        fit(module, folder, Captured(graph), Poison(7), accelerator="gpu", devices=1)
        assert task.notes["guard"] == "non-finite loss in 1 pass(es): learning rate x 0.5"
        found.append(losses(folder))
    eager, captured = found
    assert captured[9:] == pytest.approx(eager[9:], rel=1e-3)


def test_guard_after_bad_pass_keeps_to_schedule(tmp_path: Path) -> None:
    """The rate is half of what the schedule gives for the current step."""
    rates = Rates()
    fit(Broken(tiny_task(Grid(3)), OmniQuant(epochs=3, schedule="cosine"), {5}), tmp_path, rates)
    expected = [1e-2 * (1 + math.cos(math.pi * step / 9)) / 2 for step in range(9)]
    assert rates.seen == pytest.approx(expected[:6] + [rate / 2 for rate in expected[6:]])


def test_guard_after_three_bad_passes_keeps_initial_grid(tmp_path: Path) -> None:
    """The summary says so, and the remaining passes are skipped."""
    task = tiny_task(Grid(3, 16))
    start = OmniQuant().module(task).finish()
    module = fit(Broken(task, OmniQuant(epochs=9), {4, 7, 12}), tmp_path)
    assert len(losses(tmp_path)) == 12
    assert task.notes["guard"] == "non-finite loss in 3 passes: kept the initial grid"
    assert all((clip.upper == 4).all() and (clip.lower == 4).all() for clip in map(module.clip, task.layout.linears))
    for name, linear in task.result.linears.items():
        assert torch.equal(linear.codes, start.linears[name].codes)
        assert torch.equal(linear.scale, start.linears[name].scale)


@pytest.mark.parametrize("killed_at", [4, 7, 10])
@pytest.mark.parametrize("bad", [{5}, {5, 8}, {2, 5, 8}])
def test_guard_resumed_gives_same_bits_and_notes(tmp_path: Path, bad: set[int], killed_at: int) -> None:
    """Notes and rates of the guard survive an interruption."""
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


class Overflow(Callback):
    """Moves something learned so far, at the end of the last pass, that float16 cannot store what comes of it."""

    def __init__(self, part: str) -> None:
        self.part = part

    def on_train_end(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        for name, value in module.named_parameters():
            if self.part in name:
                value.data.fill_(-12.0 if "log_scale" in name else 12.0)


def halved(task: BlockTask) -> BlockTask:
    """To be deployed in float16."""
    return replace(task, grids=dict.fromkeys(task.grids, Grid(4)))


def test_omniquant_unstorable_norm_falls_back_to_start(tmp_path: Path) -> None:
    """Training is finite in float32, but a norm divided by a tiny scale overflows in float16."""
    task, start = (halved(outlier_task("opt")) for _ in range(2))
    for each in (task, start):
        each.block.get_submodule("self_attn_layer_norm").weight[0] = 3000.0
    expected = OmniQuant(transform=LET()).module(start).finish()
    before = task.run(task.inputs)
    fit(OmniQuant(epochs=1, transform=LET()).module(task), tmp_path, Overflow("self_attn_layer_norm/log_scale"))
    assert task.notes["guard"] == (
        "self_attn_layer_norm.weight is not finite in torch.float16: kept the initial grid and transform"
    )
    assert task.result is not None
    assert task.result.first_unstorable(torch.float16) is None
    torch.testing.assert_close(dict(task.result.dequantized()), dict(expected.dequantized()), rtol=0, atol=0)
    assert (task.run(task.inputs) - before).norm() < 1e-5 * before.norm()  # fused is what was kept


def test_learned_rounding_unstorable_norm_falls_back_to_earlier_codes(tmp_path: Path) -> None:
    task = halved(tiny_task(Grid(4)))
    fit(GPTQ().module(task), tmp_path / "first")
    fit(LearnedRounding(epochs=1).module(task), tmp_path / "second", Overflow("norms.input_layernorm"))
    assert (
        task.notes["guard"]
        == "input_layernorm.weight is not finite in torch.float16: kept the codes of the stage before"
    )


def test_abandon_of_stage_without_start_is_refused() -> None:
    with pytest.raises(
        UserError, match="block 0: GPTQ produced non-finite values and has no initial state to return to: "
    ):
        GPTQ().module(tiny_task(Grid(3))).abandon()


@pytest.mark.parametrize(
    ("tensors", "summary", "words"),
    [
        ({"norm.weight": torch.tensor([1.0, 1e5])}, {}, "block 7: norm.weight is not finite in torch.float16: set"),
        ({}, {"loss": math.nan}, "block 7: its output is not finite: give another trainer.precision"),
        ({}, {"loss": 1.0, "held_out_loss": math.inf}, "block 7: its output is not finite"),
    ],
)
def test_check_deployable_nonfinite_block_is_refused(tensors: dict, summary: dict, words: str) -> None:
    with pytest.raises(UserError, match=words):
        check_finite_result(7, BlockResult({}, tensors, summary), torch.float16)
    check_finite_result(7, BlockResult({}, {"norm.weight": torch.ones(2)}, {"loss": 1.0}), torch.float16)


def test_run_with_nonfinite_block_does_not_write_it(
    tmp_path: Path, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Otherwise the next attempt would take the block for finished."""
    args = write_run(tmp_path, "opt", scheme={"name": "W4A8"}, stages=[omniquant(transform={})], evaluation=None)
    with monkeypatch.context() as patch:
        patch.setattr("omniq.run.loop._mean_squares", lambda *_: (math.nan, 1.0))
        assert main([*args, "--export.format", "none"]) == 2
    said = capsys.readouterr().err
    assert "omniq: block 0: its output is not finite" in said
    assert not (tmp_path / "run/blocks/000.safetensors").exists()
    assert main([*args, "--export.format", "none"]) == 0


def test_guard_in_configuration_replaces_default(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[tuple[int, float]] = []
    start = NonFiniteGuard.on_train_start

    def watched(self: NonFiniteGuard, *args: Any) -> None:
        seen.append((self.tries, self.factor))
        start(self, *args)

    monkeypatch.setattr(NonFiniteGuard, "on_train_start", watched)
    guard = {"class_path": "omniq.callbacks.NonFiniteGuard", "init_args": {"tries": 5, "factor": 0.1}}
    assert main(write_run(tmp_path, callbacks=[guard], export={"format": "none"}, evaluation=None)) == 0
    assert seen == [(5, 0.1)] * 2  # one guard a block


@pytest.mark.parametrize("kind", [Fuse, BlockProgress, BlockLosses, PassCheckpoint, Settle])
@pytest.mark.parametrize("wrapped", [True, False])
def test_check_callbacks_internal_callback_is_refused_by_name(kind: type[Callback], wrapped: bool) -> None:
    run = SimpleNamespace(callbacks=[Callback, partial(kind) if wrapped else kind])
    with pytest.raises(UserError, match=f"callbacks: {kind.__name__} is an internal part of every fit: remove it"):
        check_callbacks(run)


def test_run_with_internal_callback_in_configuration_is_refused_before_start(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = write_run(tmp_path, callbacks=[{"class_path": "omniq.callbacks.fuse.Fuse"}])
    capsys.readouterr()
    assert main(command) == 2
    assert capsys.readouterr().err == "omniq: callbacks: Fuse is an internal part of every fit: remove it\n"
    assert not (tmp_path / "run").exists()


def test_guard_given_twice_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    guards = [{"class_path": "omniq.callbacks.NonFiniteGuard"}] * 2
    assert main(write_run(tmp_path, callbacks=guards)) == 2
    assert "callbacks: NonFiniteGuard and NonFiniteGuard are two guards of one fit: remove" in capsys.readouterr().err
