# SPDX-License-Identifier: Apache-2.0
"""All stages on a block with several grids and a linear in floating point."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from omniq.calibration.stacked_linears import StackedLinears, split_by_grid
from omniq.calibration.stage import Stage
from omniq.calibration.task import BlockTask
from omniq.stages import (
    AWQ,
    GPTQ,
    RTN,
    LearnedRounding,
    OmniQuant,
    OutlierSuppression,
    QuantEase,
    SmoothQuant,
    SpQR,
)
from omniq.storage.block_result import QuantizedLinear
from omniq.transforms.let import LET
from tests.helpers.rules import CHANNEL, KEPT, MIXED, NARROW, WIDE, mixed_task
from tests.helpers.stages import Stop, fit, fitted, tiny_task

STAGES: dict[str, Callable[[], list[Stage]]] = {
    "RTN": lambda: [RTN()],
    "GPTQ": lambda: [GPTQ(act_order=True)],
    "QuantEase": lambda: [QuantEase(sweeps=4)],
    "QuantEase from GPTQ": lambda: [GPTQ(), QuantEase(sweeps=4, start="previous")],
    "QuantEase with outliers": lambda: [QuantEase(sweeps=4, outliers=2.0, outlier_support="loss")],
    "Algorithm 3": lambda: [QuantEase(sweeps=4, outliers=2.0, outlier_method="algorithm3")],
    "SpQR": lambda: [SpQR()],
    "LearnedRounding": lambda: [RTN(), LearnedRounding(epochs=2, norm_lr=1e-3)],
    "OmniQuant": lambda: [OmniQuant(epochs=2)],
    "AWQ": lambda: [AWQ(candidates=5)],
    "SmoothQuant": lambda: [SmoothQuant(equivalences=("norm", "value_output", "up_down"))],
    "OutlierSuppression": lambda: [OutlierSuppression(candidates=4, samples=2)],
    "LET": lambda: [OmniQuant(epochs=2, transform=LET(equivalences=("norm", "value_output", "up_down")))],
}
TRANSFORMING = {"AWQ", "SmoothQuant", "OutlierSuppression", "LET"}


def run_all(stages: list[Stage], task: BlockTask, folder: Path) -> BlockTask:
    for number, stage in enumerate(stages):
        fitted(stage, task, folder / str(number))
    return task


def kept_all_but(task: BlockTask, *names: str) -> BlockTask:
    """The same task with only these linears quantized."""
    layout = task.layout.keep(set(task.layout.linears) - set(names), "a rule")
    return replace(task, layout=layout, grids={name: task.grids[name] for name in names})


@pytest.mark.parametrize("label", STAGES)
def test_stage_with_mixed_grids_puts_linears_on_their_grids(label: str, tmp_path: Path) -> None:
    task = mixed_task()
    before = task.block.get_parameter(f"{KEPT}.weight").clone()
    result = run_all(STAGES[label](), task, tmp_path).result
    assert result is not None
    assert list(result.linears) == list(task.layout.linears)
    missed = []
    for name, linear in result.linears.items():
        assert replace(linear.grid, second=None) == MIXED[name]
        assert linear.codes.max() <= MIXED[name].max_code
        assert linear.scale.shape[1] == MIXED[name].groups(linear.codes.shape[1])
        weight = task.block.get_parameter(f"{name}.weight")
        step = MIXED[name].expand(linear.scale, weight.shape[1])
        missed.append(float(((linear.dequantize() - weight).abs() / step).mean()))
    assert max(missed) < 0.7, missed  # of a step
    kept = result.tensors[f"{KEPT}.weight"]
    assert torch.equal(kept, task.block.get_parameter(f"{KEPT}.weight"))
    assert torch.equal(kept, before) != (label in TRANSFORMING)


@pytest.mark.parametrize("label", STAGES)
def test_stage_with_kept_readers_leaves_equivalent_block(label: str, tmp_path: Path) -> None:
    """Only the value projection is quantized, so no reader of a scaled input is; kept weights are stored."""
    task = kept_all_but(mixed_task(), "self_attn.v_proj")
    output = task.run(task.inputs)
    result = run_all(STAGES[label](), task, tmp_path).result
    assert result is not None
    assert list(result.linears) == ["self_attn.v_proj"]
    torch.testing.assert_close(task.run(task.inputs), output, rtol=1e-4, atol=1e-4)  # measured 1e-5
    wanted = {name for name, _ in task.block.named_parameters()} - {"self_attn.v_proj.weight"}
    assert result.tensors.keys() == wanted


EXACT: dict[str, Any] = {"sweeps": 5, "precision": "float64", "true_sequential": False}


@pytest.mark.parametrize(
    "settings",
    [
        {"act_order": True},
        {"start": "gptq", "refit_scales": True},
        {"start": "nearest", "outliers": 4.0, "outlier_support": "loss"},
    ],
)
def test_quantease_with_mixed_grids_equals_one_run_for_each_grid(settings: dict[str, Any], tmp_path: Path) -> None:
    """In float64, a stack with some rows of a group gives the result of the whole group."""
    mixed = fitted(QuantEase(**EXACT, **settings), mixed_task(), tmp_path / "mixed").task.result
    assert mixed is not None
    for number, grid in enumerate((NARROW, WIDE, CHANNEL)):
        alone = fitted(QuantEase(**EXACT, **settings), tiny_task(grid, 6), tmp_path / str(number)).task.result
        assert alone is not None
        for name in (name for name in MIXED if MIXED[name] == grid):
            assert_same(mixed.linears[name], alone.linears[name])


def test_gptq_with_mixed_grids_equals_one_run_for_each_grid(tmp_path: Path) -> None:
    """In float32 products of fewer rows may be rounded differently."""
    stage = GPTQ(true_sequential=False)
    mixed = fitted(stage, mixed_task(), tmp_path / "mixed").task.result
    assert mixed is not None
    for number, grid in enumerate((NARROW, WIDE, CHANNEL)):
        alone = fitted(stage, tiny_task(grid, 6), tmp_path / str(number)).task.result
        assert alone is not None
        for name in (name for name in MIXED if MIXED[name] == grid):
            ours, theirs = mixed.linears[name], alone.linears[name]
            assert torch.equal(ours.scale, theirs.scale)
            assert (ours.codes != theirs.codes).float().mean() < 0.01  # measured 0


def assert_same(ours: QuantizedLinear, theirs: QuantizedLinear) -> None:
    for part in ("codes", "scale", "zero_point"):
        assert torch.equal(getattr(ours, part), getattr(theirs, part)), part
    assert (ours.outliers is None) == (theirs.outliers is None)
    if ours.outliers is not None and theirs.outliers is not None:
        width = ours.codes.shape[1]
        torch.testing.assert_close(ours.outliers.dense(width), theirs.outliers.dense(width), rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize("step", [2, 3, 5, 8, 11])
@pytest.mark.parametrize("label", ["GPTQ", "QuantEase", "QuantEase with outliers"])
def test_layerwise_stage_with_mixed_grids_resumes_to_same_bits(
    label: str, step: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (stage,) = STAGES[label]()
    whole = fit(stage.module(mixed_task()), tmp_path / "whole").task.result
    monkeypatch.setattr("omniq.calibration.gram.GramModule.save_interval", 0.0)
    with pytest.raises(RuntimeError, match="stopped by the test"):
        fit(stage.module(mixed_task()), tmp_path / "cut", Stop(step))
    resumed = fit(stage.module(mixed_task()), tmp_path / "cut", resume=True).task.result
    assert whole is not None
    assert resumed is not None
    for name, linear in whole.linears.items():
        assert_same(resumed.linears[name], linear)
        if linear.outliers is not None:
            assert torch.equal(resumed.linears[name].dequantize(), linear.dequantize())


def test_split_by_grid_gives_stacks_of_one_grid() -> None:
    task = mixed_task()
    names = task.layout.groups[0]
    parts = split_by_grid(names, task.grids)
    assert parts == [("self_attn.q_proj", "self_attn.v_proj"), ("self_attn.k_proj",)]
    assert [StackedLinears.of(task, part).grid for part in parts] == [NARROW, WIDE]
    assert split_by_grid(names, dict.fromkeys(names, WIDE)) == [names]
    with pytest.raises(ValueError, match="too many values"):
        StackedLinears.of(task, names)


def test_learned_rounding_with_kept_linears_learns_norms_only(tmp_path: Path) -> None:
    task = run_all([RTN()], mixed_task(), tmp_path)
    module = LearnedRounding(norm_lr=1e-3).module(task)
    assert sorted(module.norms) == ["input_layernorm/weight", "post_attention_layernorm/weight"]
