# SPDX-License-Identifier: Apache-2.0
"""Statistics of inputs of any length against float64, and the treatment of linears that no token reaches."""

import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from omniq.calibration.input_statistics import (
    InputGram,
    InputMagnitudes,
    InputRange,
    InputRows,
    InputSquares,
    Statistic,
)
from omniq.calibration.observe import Observation, observe
from omniq.calibration.second_moments import input_grams, input_second_moments
from omniq.calibration.task import BlockTask
from omniq.errors import UserError
from tests.helpers.routed import GROUPS, SIZE, RoutedBlock, routed_task

ALL, SOME, NONE = -torch.inf, 0.5, torch.inf
EXPERT = "expert.up"
REFERENCES: dict[type[Statistic], Callable[[Tensor], Tensor]] = {
    InputGram: lambda x: x.t() @ x,
    InputSquares: lambda x: x.square().sum(0),
    InputMagnitudes: lambda x: x.abs().sum(0),
    InputRange: lambda x: torch.stack([x.amin(0), x.amax(0)]),
    InputRows: lambda x: x,
}


def reference_inputs(task: BlockTask) -> dict[str, Tensor]:
    """The input of the first linear of each group, ``[tokens, i]`` in float64."""
    block = task.block
    assert isinstance(block, RoutedBlock)
    hidden = task.inputs.double().flatten(0, 1)
    x = hidden @ block.first.weight.double().t()
    seen = x[hidden[:, 0] > block.threshold]
    up, gate = (each.weight.double() for each in (block.expert.up, block.expert.gate))
    y = x.clone()
    y[hidden[:, 0] > block.threshold] += torch.tanh(seen @ gate.t()) * (seen @ up.t())
    return {"first": hidden, EXPERT: seen, "last": y}


@pytest.mark.parametrize("skips", [True, False])
@pytest.mark.parametrize("threshold", [ALL, SOME, NONE])
@pytest.mark.parametrize("statistic", REFERENCES)
def test_observe_any_number_of_tokens_equals_float64(statistic: type[Statistic], threshold: float, skips: bool) -> None:
    task = routed_task(threshold, skips)
    expected = reference_inputs(task)
    seen = observe(task, [statistic()])
    assert list(seen) == [group[0] for group in GROUPS]
    for name, x in expected.items():
        assert seen[name].tokens == len(x)
        if not len(x):
            assert seen[name].totals == ()
            continue
        (total,) = seen[name].totals
        torch.testing.assert_close(total.double(), REFERENCES[statistic](x), rtol=1e-5, atol=1e-5)  # measured 2e-6


def test_routed_task_expert_token_count_differs_between_batches() -> None:
    """With equal counts, code that mixes up the tokens of batches could pass the tests above."""
    task = routed_task(SOME)
    counts = [(batch[..., 0] > SOME).sum().item() for batch in task.inputs.split(4)]
    assert len(set(counts)) == len(counts)
    assert all(count % task.inputs.shape[1] for count in counts)


@pytest.mark.parametrize("moments", [input_second_moments, input_grams])
def test_second_moments_of_routed_linear_are_means_over_its_tokens(moments: Callable[..., Any]) -> None:
    task = routed_task(SOME)
    for name, x in reference_inputs(task).items():
        gram = x.t() @ x / len(x)
        wanted = gram if moments is input_grams else gram.diagonal()
        torch.testing.assert_close(moments(task)[name].double(), wanted, rtol=1e-5, atol=1e-6)  # measured 1e-6
    assert "unreached" not in task.notes


def test_second_moments_unreached_linear_counts_all_inputs_alike_and_is_noted() -> None:
    task = routed_task(NONE)
    assert torch.equal(input_second_moments(task)["expert.gate"], torch.ones(SIZE))
    assert torch.equal(input_grams(task)[EXPERT], torch.eye(SIZE))
    assert task.notes["unreached"].startswith("no calibration token reaches expert.up, expert.gate:")


def test_observe_relative_weights_of_all_tokens_equal_float64() -> None:
    task = routed_task(ALL)
    task.layout = replace(task.layout, flat=GROUPS[1])
    weights = task.targets.double().square().mean(-1).flatten().reciprocal()
    for name, x in reference_inputs(task).items():
        (total,) = observe(task, [InputGram()], token_weights="relative")[name].totals
        torch.testing.assert_close(total.double(), (x * weights[:, None]).t() @ x, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(("threshold", "flat"), [(SOME, ()), (SOME, GROUPS[1]), (ALL, ())])
def test_observe_relative_weights_of_unknown_rows_are_refused(threshold: float, flat: tuple[str, ...]) -> None:
    """An expert may receive all tokens in another order, so the number of tokens does not identify them."""
    task = routed_task(threshold)
    task.layout = replace(task.layout, flat=flat)
    with pytest.raises(UserError, match="block/000 expert.up: token_weights 'relative' .* set token_weights to 'unif"):
        observe(task, [InputGram()], token_weights="relative")


def test_observe_not_finite_tokens_of_an_expert_are_counted() -> None:
    task = routed_task(SOME)
    task.inputs[0, 0, 0] = 1.0  # this token and the next one reach the expert
    task.inputs[0, 1, 0] = 1.0
    tokens = int((task.inputs[..., 0] > SOME).sum())
    task.inputs[0, :2, 1] = torch.nan
    with pytest.raises(
        UserError, match=f"expert.up: the Gram matrix is not finite because 2 of {tokens} tokens have non-finite"
    ):
        observe(task, [InputGram()], [EXPERT])
    with pytest.raises(
        UserError, match="first: the range of its inputs is not finite because 1 of 6 samples have non-finite"
    ):
        observe(task, [InputRange()])


def completed(threshold: float, skips: bool, batches: int) -> int:
    """How many of some batches, of which all but the first have no token for the expert, run to the end."""
    task = routed_task(threshold, skips)
    task.inputs[1:, :, 0] = -9.0
    observation = Observation(task, [InputGram()], [EXPERT])
    for sample in range(batches):
        observation.run_batch(slice(sample, sample + 1))
    assert isinstance(task.block, RoutedBlock)
    return task.block.completed


def test_observation_with_all_inputs_seen_stops_early() -> None:
    task = routed_task(ALL)
    Observation(task, [InputGram()], ["first", EXPERT]).run_batch(slice(0, 4))
    observe(task, [InputGram()])  # up to the input of the last linear
    assert isinstance(task.block, RoutedBlock)
    assert task.block.completed == 0


def test_observation_linear_called_on_no_rows_still_stops_early() -> None:
    assert completed(NONE, skips=False, batches=4) == 0


def test_observation_linear_not_called_stops_where_a_later_group_begins() -> None:
    assert completed(-9.0, skips=True, batches=4) == 0


def test_observation_linear_never_called_is_waited_for() -> None:
    """Only whole forward passes show that no token reaches the linear."""
    assert completed(NONE, skips=True, batches=4) == 4


def test_observation_linear_called_after_a_later_group_is_still_observed() -> None:
    """A layout whose order differs from that of the block costs time but loses no tokens."""
    task = routed_task(SOME)
    groups = (("last",), *GROUPS[:2])
    task.layout = replace(task.layout, groups=groups)
    seen = observe(task, [InputGram()], ["last"])
    assert seen["last"].tokens == 30


TWO = """
import sys
import torch
import torch.distributed as dist
from omniq.calibration.input_statistics import InputGram, InputRange, InputRows
from omniq.calibration.observe import observe
from omniq.calibration.second_moments import input_grams
from omniq.distributed import collectives
from omniq.errors import UserError
from omniq.stages import GPTQ
from tests.helpers.routed import routed_task

def task(threshold, share):
    task = routed_task(threshold)
    task.inputs[1::2, :, 0] = -9.0  # the second process has no token for the expert
    if share:
        task.inputs, task.targets = (collectives.local_shard(each) for each in (task.inputs, task.targets))
    return task

statistics = [InputGram(), InputRange()]
whole = {threshold: observe(task(threshold, False), statistics) for threshold in (0.5, torch.inf)}
dist.init_process_group("gloo")
for threshold, expected in whole.items():
    mine = task(threshold, True)
    seen = observe(mine, statistics)
    for name, (tokens, totals) in ((name, (each.tokens, each.totals)) for name, each in expected.items()):
        assert seen[name].tokens == tokens, name
        for ours, theirs in zip(seen[name].totals, totals, strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)
    input_grams(mine)
    assert ("unreached" in mine.notes) == (threshold == torch.inf)
rows = observe(task(0.5, True), [InputRows()], samples=1 - collectives.rank())["first"]
assert rows.tokens == 5 and len(rows.totals[0]) == 5 * (1 - collectives.rank())
try:
    observe(task(0.5, True), [InputGram()], token_weights="relative")
except UserError as error:
    assert isinstance(error, collectives.ErrorOnRank0) == (collectives.rank() > 0)
else:
    raise AssertionError("not refused")
collectives.finish_on_rank0()
"""


def test_observe_process_without_tokens_agrees_with_others(tmp_path: Path) -> None:
    script = tmp_path / "two.py"
    script.write_text(TWO)
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(Path(__file__).parents[2]), *sys.path])}
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", str(script)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, env=environment)
    assert done.returncode == 0, done.stderr
