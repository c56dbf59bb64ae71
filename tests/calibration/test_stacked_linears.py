# SPDX-License-Identifier: Apache-2.0
"""Linears with one input as one matrix, whose rows several processes share."""

import os
import subprocess
import sys
from pathlib import Path

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from omniq.calibration.stacked_linears import StackedLinears
from omniq.grid.affine import Grid
from omniq.quantizers.clipping import MinMax, Searched
from omniq.stages import RTN, QuantEase
from tests.helpers.stages import fitted, tiny_task


@settings(max_examples=30, deadline=None)
@given(rows=st.lists(st.integers(1, 5), min_size=1, max_size=4), processes=st.integers(1, 6))
def test_stacked_linears_parts_make_whole_stack(rows: list[int], processes: int) -> None:
    total = sum(rows)
    weight = torch.arange(2.0 * total).view(total, 2)
    stack = StackedLinears(
        tuple(f"linear{k}" for k in range(len(rows))), tuple(rows), weight, Grid(3), (weight[:, :1], weight[:, 1:])
    )
    ends = [total * number // processes for number in range(processes + 1)]
    parts = [stack.select_rows(slice(start, end)) for start, end in zip(ends, ends[1:], strict=False)]
    for k, (name, whole) in enumerate(stack.split(weight)):
        split = [list(part.split(part.weight))[k] for part in parts]
        assert all(each == name for each, _ in split)
        assert torch.equal(torch.cat([piece for _, piece in split]), whole)
    assert torch.equal(torch.cat([part.scale for part in parts]), stack.scale)
    assert torch.equal(torch.cat([part.zero_point for part in parts]), stack.zero_point)


def test_stacked_linears_of_one_process_has_all_rows() -> None:
    stack = StackedLinears(("a", "b"), (3, 2), torch.arange(10.0).view(5, 2), Grid(3))
    assert stack.local_rows == slice(0, 5)
    assert stack.gather(stack.weight) is stack.weight


def test_quantease_start_from_codes_of_other_grid_is_their_weights(tmp_path: Path) -> None:
    """The start is the weights that the earlier stage made, not its codes read on the new grid."""
    grid, task = Grid(3, 16), tiny_task(Grid(3, 16), samples=6)
    previous = fitted(RTN(clipping=MinMax()), task, tmp_path / "rtn").task.result
    assert previous is not None
    module = QuantEase(sweeps=1, start="previous", grid="clipping", clipping=Searched()).module(task)
    for names in task.layout.groups:
        part = StackedLinears.of(task, names)
        part.fitted = grid.fit(*Searched().range(part.weight, grid, torch.ones(part.weight.shape[1])))
        start = module._start(part, torch.empty(0), None, slice(0, len(part.weight)))
        assert torch.equal(start, torch.cat([previous.linears[name].dequantize() for name in names]))


SHARES = """
import torch
import torch.distributed as dist
from omniq.distributed import collectives
from omniq.errors import UserError
from omniq.grid.affine import Grid
from omniq.stages import GPTQ, QuantEase
from omniq.calibration.input_statistics import InputGram
from omniq.calibration.observe import observe
from tests.helpers.stages import tiny_task

def solved(stage):
    task = tiny_task(Grid(3, 16), samples=4)
    module = stage.module(task)
    found, errors = {}, []
    for k, names in enumerate(task.layout.groups):
        generator = torch.Generator().manual_seed(k)
        width = task.linear(names[0]).in_features
        x = torch.randn(200, width, generator=generator) @ torch.randn(width, width, generator=generator)
        module.grams[k], module.tokens[k] = x.t() @ x, len(x)
        for step in range(module.work):
            done = module.solve(k, module._stack(k), module.grams[k], step)
            errors += [value for _, value in module.tracked]
            module.tracked.clear()
        found |= done
    return found, errors

exact = {"sweeps": 7, "precision": "float64"}
stages = (  # and the share of codes that may differ
    (0.002, lambda: GPTQ(act_order=True)),
    (0.002, lambda: QuantEase(sweeps=7)),
    (0, lambda: QuantEase(start="gptq", act_order=True, refit_scales=True, **exact)),
    (0, lambda: QuantEase(outliers=5.0, outlier_support="loss", start="nearest", **exact)),
    (0, lambda: QuantEase(outliers=5.0, outlier_method="algorithm3", **exact)),
)
by_one = [solved(make()) for _, make in stages]
dist.init_process_group("gloo")
for (most, make), (theirs, expected) in zip(stages, by_one, strict=True):
    ours, errors = solved(make())
    torch.testing.assert_close(errors, expected, rtol=1e-5, atol=0)  # measured 5e-7
    for name, linear in ours.items():
        other = theirs[name]
        assert (linear.codes != other.codes).float().mean() <= most, name  # measured: 0 in float32 as well
        assert linear.scale.equal(other.scale) and linear.zero_point.equal(other.zero_point), name
        assert (linear.outliers is None) == (other.outliers is None)
        if linear.outliers is not None:
            torch.testing.assert_close(linear.outliers.dense(64), other.outliers.dense(64), rtol=2e-3, atol=1e-6)
try:
    task = tiny_task(Grid(3, 16), samples=4)
    task.inputs[: 2 if collectives.rank() else 1] = torch.nan
    observe(task, [InputGram()])
except UserError as error:
    assert isinstance(error, collectives.ErrorOnRank0) == (collectives.rank() > 0)
    assert "block/000 self_attn.q_proj: the Gram matrix is not finite because 5 of 12 samples" in str(error)
else:
    raise AssertionError("not refused")
collectives.finish_on_rank0()
"""


def test_solvers_with_rows_shared_by_processes_equal_one_process(tmp_path: Path) -> None:
    """The same Gram matrix gives the same codes and scales; float32 may differ at ties.

    Each of three processes first solves all rows alone, then its share; the shares differ by one row.
    """
    script = tmp_path / "shares.py"
    script.write_text(SHARES)
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(Path(__file__).parents[2]), *sys.path])}
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "3", str(script)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, env=environment)
    assert done.returncode == 0, done.stderr
