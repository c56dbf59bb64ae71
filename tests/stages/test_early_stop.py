# SPDX-License-Identifier: Apache-2.0
"""Learned rounding with ``held_out`` stops early and keeps its best state on samples that it does not learn from."""

import copy
import csv
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from omniq.blocks.forward import call_block
from omniq.blocks.weights import load_quantized_weights
from omniq.calibration.task import BlockTask
from omniq.errors import UserError
from omniq.grid.affine import Grid
from omniq.quantizers.clipping import Searched
from omniq.run.fingerprint import fingerprint
from omniq.stages import RTN, LearnedRounding
from omniq.storage.block_result import BlockResult
from tests.helpers.stages import Stop, fit, fitted, losses, tiny_task

KEPT = 2  # of the 6 samples
FAST: dict[str, Any] = {"rounding_lr": 0.2, "scale_lr": 0.1, "schedule": "constant"}  # so fast that the loss rises soon


def rounded(folder: Path) -> BlockTask:
    """A tiny block with the codes of a round-to-nearest stage."""
    folder.mkdir(exist_ok=True)
    return fitted(RTN(clipping=Searched()), tiny_task(Grid(2, 16), samples=6), folder / "rtn").task


def held_out_rows(folder: Path) -> list[float]:
    """The loss on the kept samples after each pass, from the CSV file of a fit."""
    with (folder / "losses.csv").open() as file:
        return [float(row["value"]) for row in csv.DictReader(file) if row["name"] == "held_out_loss"]


def error(task: BlockTask, result: BlockResult | None) -> float:
    """Mean squared error of the deployed block on the kept samples, float64."""
    assert result is not None
    block = copy.deepcopy(task.block)
    load_quantized_weights(block, result)
    with torch.no_grad():
        outputs = call_block(block, task.inputs[-KEPT:], task.kwargs)
    return (outputs - task.targets[-KEPT:]).double().square().mean().item()


def assert_same(one: BlockResult | None, other: BlockResult | None) -> None:
    assert one is not None
    assert other is not None
    for name, linear in one.linears.items():
        for part in ("codes", "scale", "zero_point"):
            assert torch.equal(getattr(linear, part), getattr(other.linears[name], part)), (name, part)


@pytest.mark.parametrize("rates", [{"rounding_lr": 2e-2, "scale_lr": 5e-3}, FAST], ids=["slow", "fast"])
def test_learned_rounding_held_out_keeps_state_with_lowest_loss(tmp_path: Path, rates: dict[str, Any]) -> None:
    task = rounded(tmp_path)
    before = error(task, task.result)
    fitted(LearnedRounding(epochs=12, held_out=0.3, patience=12, **rates), task, tmp_path / "tuned")
    rows = held_out_rows(tmp_path / "tuned")
    assert len(rows) == 12
    lowest = min([before, *rows])
    assert error(task, task.result) == pytest.approx(lowest, rel=2e-3)  # scales are stored in float16
    assert lowest < before or rates is FAST
    assert rows[-1] > 1.05 * lowest or rates is not FAST


def test_learned_rounding_held_out_worse_in_every_pass_keeps_codes_of_stage_before(tmp_path: Path) -> None:
    task = rounded(tmp_path)
    before, rates = task.result, {"rounding_lr": 0.9, "scale_lr": 0.9}
    fitted(LearnedRounding(epochs=9, held_out=0.3, patience=2, **rates), task, tmp_path / "tuned")
    assert len(held_out_rows(tmp_path / "tuned")) == 2  # the fit stops at its patience
    assert len(losses(tmp_path / "tuned")) == 2 * (6 - KEPT)
    assert_same(task.result, before)


def test_learned_rounding_held_out_samples_do_not_enter_learning(tmp_path: Path) -> None:
    """The losses of a fit are those of a fit that has the first samples only."""
    task = rounded(tmp_path)
    few = replace(task, inputs=task.inputs[:-KEPT], targets=task.targets[:-KEPT])
    for name, settings, each in (("kept", {"held_out": 0.3}, task), ("few", {}, few)):
        fitted(LearnedRounding(epochs=3, augmented_loss=True, **settings), replace(each), tmp_path / name)
    assert losses(tmp_path / "kept") == losses(tmp_path / "few")


def test_learned_rounding_held_out_loss_equals_augmented_relative_loss_of_kept_samples(tmp_path: Path) -> None:
    """The loss includes the constant that the average of the two targets leaves out."""
    task = rounded(tmp_path)
    module = LearnedRounding(held_out=0.3, augmented_loss=True, token_weights="relative").module(task)
    with torch.no_grad():
        outputs, own = module(task.inputs[-KEPT:]), task.run(task.inputs)[-KEPT:]
    first, targets = task.targets[-KEPT:].double(), own.double()
    weights = ((first + targets) / 2).square().mean(-1, keepdim=True).reciprocal()
    expected = sum(((outputs - each).square() * weights).mean().item() for each in (first, targets))
    assert module.held_out_loss().item() == pytest.approx(expected, rel=1e-5)  # measured: 1e-7


@pytest.mark.parametrize("killed_at", [5, 9, 14])
@pytest.mark.parametrize("rates", [{}, FAST], ids=["slow", "fast"])
def test_learned_rounding_held_out_killed_resumes_to_same_bits(
    tmp_path: Path, killed_at: int, rates: dict[str, Any]
) -> None:
    stage = LearnedRounding(epochs=4, norm_lr=1e-3, held_out=0.3, patience=4, **rates)
    whole = fitted(stage, rounded(tmp_path / "a"), tmp_path / "whole").task.result
    with pytest.raises(RuntimeError, match="stopped by the test"):
        fit(stage.module(rounded(tmp_path / "b")), tmp_path / "cut", Stop(killed_at))
    found = fit(stage.module(rounded(tmp_path / "c")), tmp_path / "cut", resume=True).task.result
    assert (tmp_path / "cut/losses.csv").read_bytes() == (tmp_path / "whole/losses.csv").read_bytes()
    assert_same(whole, found)


def test_learned_rounding_abandoned_forgets_best_state(tmp_path: Path) -> None:
    task = rounded(tmp_path)
    module = fitted(LearnedRounding(epochs=4, rounding_lr=2e-2, held_out=0.3), replace(task), tmp_path / "tuned")
    assert module.abandon() == "the codes of the stage before"
    assert_same(module.finish(), task.result)


def test_fingerprint_omits_early_stopping_unless_used() -> None:
    entry = "stages: [{{class_path: x, init_args: {{epochs: 2{}}}}}]"
    plain = fingerprint(entry.format(""))
    assert fingerprint(entry.format(", held_out: 0.0, patience: 3")) == plain
    assert fingerprint(entry.format(", held_out: 0.1, patience: 3")) != plain


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (lambda: LearnedRounding(held_out=1.0), r"LearnedRounding.held_out 1.0 is out of range: give 0 or more"),
        (lambda: LearnedRounding(held_out=-0.1), r"LearnedRounding.held_out -0.1 is out of range"),
        (lambda: LearnedRounding(held_out=0.1, patience=0), r"LearnedRounding.patience 0 is too small"),
        (
            lambda: LearnedRounding(held_out=0.1).check_samples(1),
            r"held_out 0.1 keeps all 1 samples of a process from learning: lower it, or raise data.samples",
        ),
    ],
)
def test_learned_rounding_impossible_early_stopping_is_refused(make: Any, says: str) -> None:
    with pytest.raises(UserError, match=says):
        make()
