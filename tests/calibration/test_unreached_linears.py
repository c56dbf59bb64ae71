# SPDX-License-Identifier: Apache-2.0
"""Stages on linears that few or no calibration tokens reach, such as those of an expert."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from omniq.calibration.fuse import input_ranges
from omniq.calibration.gram import GramModule
from omniq.calibration.rounding import round_to_nearest
from omniq.calibration.stage import Stage
from omniq.calibration.static_ranges import calibrate_static_ranges
from omniq.calibration.task import BlockTask
from omniq.errors import UserError
from omniq.quantizers.clipping import MinMax, Searched
from omniq.stages import GPTQ, RTN, QuantEase, SpQR
from omniq.storage.block_result import BlockResult
from tests.helpers.routed import GROUPS, SIZE, routed_task
from tests.helpers.stages import fitted

ALL, SOME, NONE = -torch.inf, 0.5, torch.inf
EXPERT = "expert.up"


def test_input_ranges_of_unreached_linear_are_left_out() -> None:
    assert input_ranges(routed_task(NONE)).lo.keys() == {"first", "last"}
    assert input_ranges(routed_task(SOME)).lo.keys() == {"first", "last", "expert.up", "expert.gate"}


def test_static_range_of_unreached_linear_is_refused() -> None:
    task = routed_task(NONE)
    linears = {name: round_to_nearest(task.linear(name).weight, task.grids[name]) for name in task.layout.linears}
    with pytest.raises(UserError, match="expert.up: no calibration token reaches .* set scheme.activation_range to"):
        calibrate_static_ranges(task, BlockResult(linears, task.plain_tensors()))


@pytest.mark.parametrize("skips", [True, False])
@pytest.mark.parametrize("sequential", [True, False])
@pytest.mark.parametrize("threshold", [SOME, NONE])
@pytest.mark.parametrize("make", [GPTQ, SpQR, lambda: QuantEase(sweeps=3)], ids=["GPTQ", "SpQR", "QuantEase"])
def test_gram_stage_unreached_linear_is_rounded_to_nearest_and_noted(
    make: Callable[[], Any], threshold: float, sequential: bool, skips: bool, tmp_path: Path
) -> None:
    task, stage = routed_task(threshold, skips), make()
    stage.true_sequential = sequential
    result = fitted(stage, task, tmp_path).task.result
    assert result is not None
    assert result.linears.keys() == set(task.layout.linears)
    clipping = MinMax() if isinstance(stage, SpQR) else Searched()
    for name in GROUPS[1]:
        nearest = round_to_nearest(task.linear(name).weight, task.grids[name], clipping, torch.ones(SIZE))
        assert torch.equal(result.linears[name].codes, nearest.codes) == (threshold == NONE)
    assert ("unreached" in task.notes) == (threshold == NONE)
    if threshold == NONE:
        assert "expert.up, expert.gate" in task.notes["unreached"]


def test_gram_stage_unreached_linear_keeps_the_codes_that_the_stage_takes(tmp_path: Path) -> None:
    task = routed_task(NONE)
    before = fitted(RTN(), task, tmp_path / "rtn").task.result
    after = fitted(QuantEase(sweeps=3, start="previous"), task, tmp_path / "quantease").task.result
    assert before is not None
    assert after is not None
    for name in GROUPS[1]:
        assert torch.equal(before.linears[name].codes, after.linears[name].codes)
    assert not torch.equal(before.linears["first"].codes, after.linears["first"].codes)


@pytest.mark.parametrize("make", [lambda: RTN(Searched()), lambda: RTN(Searched("gram"))], ids=["diagonal", "gram"])
def test_rtn_unreached_linear_is_searched_with_equal_weights(make: Callable[[], Stage], tmp_path: Path) -> None:
    task = routed_task(NONE)
    result = fitted(make(), task, tmp_path).task.result
    assert result is not None
    nearest = round_to_nearest(task.linear(EXPERT).weight, task.grids[EXPERT], Searched(), torch.ones(SIZE))
    assert torch.equal(result.linears[EXPERT].codes, nearest.codes)
    assert "expert.up, expert.gate" in task.notes["unreached"]


def gram_module(task: BlockTask) -> GramModule:
    module = GPTQ().module(task)
    assert isinstance(module, GramModule)
    return module


def test_gram_stage_saved_for_other_groups_is_not_resumed() -> None:
    checkpoint: dict[str, Any] = {}
    gram_module(routed_task(SOME)).on_save_checkpoint(checkpoint)
    assert gram_module(routed_task(SOME)).can_resume(checkpoint)
    regrouped = routed_task(SOME)
    regrouped.layout = regrouped.layout.keep(["first"], "by the test")
    assert not gram_module(regrouped).can_resume(checkpoint)


def test_gram_stage_saved_by_1b67ee7_has_every_token_in_each_gram_matrix() -> None:
    saved = {"gram stage": {"grams": {0: torch.eye(SIZE)}, "bad": {}, "found": {}, "solvers": {}}}
    module = gram_module(routed_task(ALL))
    assert module.can_resume(saved)
    module.on_load_checkpoint(saved)
    assert module.tokens == {0: 30, 1: 30, 2: 30}
    assert torch.equal(module.second_moment(0), torch.ones(SIZE) / 30)
