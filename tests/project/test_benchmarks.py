# SPDX-License-Identifier: Apache-2.0
"""The benchmarks: their counts of work are right, and each writes a figure, its floor, ratio and memory."""

import json
import math
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from omniq.grid.scheme import Scheme
from omniq.stages.omniquant import OmniQuant
from omniq.transforms.let import LET

ROOT = Path(__file__).resolve().parents[2]
SMALL: dict[str, tuple[str, ...]] = {
    "block_step": ("--shape", "tiny", "--schemes", "W4A16", "--tokens", "16", "--steps", "8"),
    "coordinate_descent": ("--layers", "o", "--sweeps", "3", "--reference", "1"),
    "fake_quant": ("--repeats", "1"),
    "packing": ("--repeats", "1"),
    "throughput": ("--blocks", "1", "--samples", "2", "--length", "16", "--epochs", "1"),
}
# where the figures are, and those that each must have: the figure itself, floor, ratio, memory
FIGURES: dict[str, tuple[str, tuple[str, ...]]] = {
    "block_step": ("rows", ("step_ms", "floor_ms", "speedup", "gib", "eager_gib")),
    "coordinate_descent": ("runs", ("solver_ms", "floor_ms", "ratio", "solver_mib")),
    "fake_quant": ("rows", ("fused_ms", "floor_ms", "speedup", "fused_mib", "eager_mib")),
    "packing": ("rows", ("pack_s", "floor_s", "speedup", "pack_mib")),
    "throughput": ("", ("seconds_per_block", "floor_seconds_per_block", "speedup", "host_bytes")),
}


@pytest.fixture
def llama(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """``measuring.llama``, as the benchmarks import it."""
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    import measuring.llama

    return measuring.llama


@pytest.fixture
def machine(llama: ModuleType) -> ModuleType:
    import measuring.machine

    return measuring.machine


def causal(counted: FlopCounterMode) -> int:
    """Operations of all products; of eager attention, which is made of batched ones, the half that its mask leaves."""
    flops = {str(name): count for name, count in counted.get_flop_counts()["Global"].items()}
    return flops.pop("aten.bmm") // 2 + sum(flops.values())


def test_benchmarks_are_all_tested() -> None:
    assert {path.stem for path in (ROOT / "benchmarks").glob("*.py")} == set(SMALL) == set(FIGURES)


def test_rates_floor_is_larger_of_arithmetic_and_bytes(machine: ModuleType) -> None:
    rates = machine.Rates(operations=10.0, moved=4.0)
    assert rates.floor(machine.Work(100, 8)) == 10.0
    assert rates.floor(machine.Work(100, 80)) == 20.0


def test_peak_bytes_on_cpu_counts_what_is_alive_at_once(machine: ModuleType) -> None:
    """The peak excludes tensors that are freed in between and tensors that existed before."""
    before = torch.ones(2**20)

    def work() -> None:
        first = torch.empty(2**18)
        second = before * 2
        del first
        third = torch.empty(2**17)
        del second, third

    # a Python number is a tensor for a moment: 12 bytes measured
    assert machine.peak_bytes(work, "cpu") == pytest.approx(4 * (2**18 + 2**20), abs=64)
    assert machine.peak_bytes(lambda: None, "cpu") == 0


@pytest.mark.parametrize("scheme", ["W4A16", "W3A16g64", "W4A4KV4"])
def test_step_work_operations_equal_count_of_torch(scheme: str, llama: ModuleType) -> None:
    from plain.step import Eager

    task = llama.make_task("tiny", Scheme(scheme), "cpu", 16, 2, torch.float32)
    eager = Eager(task, OmniQuant(transform=LET() if task.activations.quantized else None))
    with FlopCounterMode(display=False) as counted:
        eager.step(task.inputs[:1], task.targets[:1])
    assert llama.step_work(task, eager.module).operations == causal(counted)


def test_forward_work_operations_equal_count_of_torch(llama: ModuleType) -> None:
    task = llama.make_task("tiny", Scheme("W4A16"), "cpu", 16, 3, torch.float32)
    task.block.self_attn.config._attn_implementation = "eager"
    with FlopCounterMode(display=False) as counted:
        task.run(task.inputs)
    assert llama.forward_work(task, 3).operations == causal(counted)


@pytest.mark.slow
@pytest.mark.parametrize("name", sorted(SMALL))
def test_benchmark_writes_figure_floor_ratio_and_memory(name: str, tmp_path: Path) -> None:
    path = tmp_path / "figures" / f"{name}.json"  # a folder that is made
    command = [sys.executable, f"benchmarks/{name}.py", "--device", "cpu", *SMALL[name], "--json", str(path)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    where, names = FIGURES[name]
    written: dict[str, Any] = json.loads(path.read_text())
    assert {"device", "torch"} <= set(written)
    rows = written[where] if where else [written]
    assert rows
    for row in rows:
        figures = row.get("total", row)
        assert all(math.isfinite(figures[each]) and figures[each] > 0 for each in names), figures
