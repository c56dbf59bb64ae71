# SPDX-License-Identifier: Apache-2.0
"""Two processes give what one does, and a run goes on with another number of them.

Everything here starts ``torchrun`` with two processes over gloo, as a user would on a machine without GPUs.
"""

import csv
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from runs import SMALL, configuration, omniquant, write_run

from omniq import processes
from omniq.cli import main
from omniq.errors import UserError
from omniq.launch import BlockParallel, join, launch_arguments
from omniq.preflight import check_shares
from omniq.result import BlockResult
from omniq.streams import Streams

TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", "omniq"]
SEARCHED = {"class_path": "omniq.quantizers.clipping.Searched"}
RTN = {"class_path": "omniq.stages.RTN", "init_args": {"clipping": SEARCHED}}
LEARNED = {"clipping": {"class_path": "omniq.quantizers.clipping.LWC", "init_args": {"initial": SEARCHED}}}


def prepared(folder: Path, stages: list[dict[str, Any]], samples: int = 8, held_out: int = 2) -> list[str]:
    """The command line of a run whose samples two processes can share."""
    data = configuration(folder)["data"] | {"samples": samples, "held_out": held_out}
    export = {"format": "none"}
    return write_run(folder, model=SMALL, stages=stages, data=data, evaluation=None, export=export)


def together(args: list[str], out: Path, status: int = 0) -> str:
    """Run a command line in two processes, and return what they print."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run([*TORCHRUN, *args, "--out", str(out)], capture_output=True, text=True, env=environment)
    assert (done.returncode == 0) == (status == 0), done.stderr
    return done.stdout + done.stderr


def alone(args: list[str], out: Path) -> None:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # as in the other processes: sums inside a product depend on it
    try:
        assert main([*args, "--out", str(out)]) == 0
    finally:
        torch.set_num_threads(threads)


def blocks(out: Path) -> list[BlockResult]:
    return [BlockResult.load(path) for path in sorted((out / "blocks").glob("*.safetensors"))]


def losses(path: Path) -> list[float]:
    with path.open() as file:
        return [float(row["value"]) for row in csv.DictReader(file)]


def assert_same_codes(ours: list[BlockResult], theirs: list[BlockResult]) -> None:
    assert len(ours) == len(theirs) == 2
    for one, other in zip(ours, theirs, strict=True):
        assert one.linears.keys() == other.linears.keys()
        for name, linear in one.linears.items():
            for part in ("codes", "scale", "zero_point"):
                assert torch.equal(getattr(linear, part), getattr(other.linears[name], part)), (name, part)
        for key in ("loss", "held_out_loss"):
            assert one.summary[key] == pytest.approx(other.summary[key], rel=1e-12)  # measured: 3e-16


@pytest.mark.slow
def test_exact_sums_give_equal_codes(tmp_path: Path) -> None:
    """Importances are exact sums, so that rounding on the searched range does not depend on the number of processes."""
    args = prepared(tmp_path, [RTN])
    alone(args, tmp_path / "one")
    together(args, tmp_path / "two")
    assert_same_codes(blocks(tmp_path / "two"), blocks(tmp_path / "one"))


@pytest.mark.slow
def test_batches_add_up(tmp_path: Path) -> None:
    """Two processes with one sample a step are one process with two: DDP averages the gradients, the CSV the losses."""
    alone(prepared(tmp_path / "a", [omniquant(batch_size=2, **LEARNED)]), tmp_path / "one")
    together(prepared(tmp_path / "b", [omniquant(batch_size=1, **LEARNED)]), tmp_path / "two")
    for name in ("blocks/000.0.csv", "blocks/001.0.csv"):
        ours, theirs = losses(tmp_path / "two" / name), losses(tmp_path / "one" / name)
        assert len(ours) == 8  # two passes of four steps
        assert ours == pytest.approx(theirs, rel=1e-4)  # measured: 3e-7
    for ours, theirs in zip(blocks(tmp_path / "two"), blocks(tmp_path / "one"), strict=True):
        for key in ("OmniQuant.loss.first", "OmniQuant.loss.last", "loss", "held_out_loss"):
            assert ours.summary[key] == pytest.approx(theirs.summary[key], rel=1e-3)  # measured: 3e-7


@pytest.mark.slow
@pytest.mark.parametrize("stage", ["omniq.stages.GPTQ"])
def test_gram_matrices_add_up(tmp_path: Path, stage: str) -> None:
    args = prepared(tmp_path, [{"class_path": stage}])
    alone(args, tmp_path / "one")
    together(args, tmp_path / "two")
    for ours, theirs in zip(blocks(tmp_path / "two"), blocks(tmp_path / "one"), strict=True):
        different = sum(int((ours.linears[n].codes != theirs.linears[n].codes).sum()) for n in ours.linears)
        assert different <= 0.01 * sum(linear.codes.numel() for linear in ours.linears.values())
        assert ours.summary["loss"] == pytest.approx(theirs.summary["loss"], rel=0.02)


@pytest.mark.slow
@pytest.mark.parametrize("then", [1, 2])
def test_killed_and_continued(tmp_path: Path, then: int) -> None:
    """One of two processes is killed in the second block; the rest ends at once, and one or two go on.

    Two end as if nothing had happened; one starts the second block over, from the streams of both.
    """
    args = prepared(tmp_path, [omniquant(epochs=40, **LEARNED)])
    together(args, tmp_path / "whole")
    out = tmp_path / "run"
    command = [*TORCHRUN, *args, "--out", str(out)]
    parent = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    while not (out / "current/001.0.last.ckpt").exists():
        assert parent.poll() is None, parent.stdout and parent.stdout.read()
        time.sleep(0.001)
    children = Path(f"/proc/{parent.pid}/task/{parent.pid}/children").read_text().split()
    os.kill(int(children[-1]), signal.SIGKILL)
    begun = time.perf_counter()
    parent.communicate(timeout=60)
    assert parent.returncode != 0
    assert time.perf_counter() - begun < 60
    assert not (out / "blocks/001.safetensors").exists(), "the kill came too late to show anything"
    if then == 2:
        together(args, out)
        assert_same_codes(blocks(out), blocks(tmp_path / "whole"))
        assert (out / "blocks/001.0.csv").read_text() == (tmp_path / "whole/blocks/001.0.csv").read_text()
        return
    first = (out / "blocks/000.safetensors").read_bytes()
    alone(args, out)
    assert (out / "blocks/000.safetensors").read_bytes() == first
    assert len(losses(out / "blocks/000.0.csv")) == 160
    assert len(losses(out / "blocks/001.0.csv")) == 320  # every sample is a step again


@pytest.mark.slow
def test_mistakes_are_told_once(tmp_path: Path) -> None:
    args = prepared(tmp_path, [RTN], samples=7)
    assert "data.samples 7 is not divisible by the 2 processes: give 6" in together(args, tmp_path / "run", status=2)
    args = prepared(tmp_path, [RTN])
    told = together([*args, "--trainer.devices", "1"], tmp_path / "run", status=2)
    assert "trainer.devices 1 means 1 process(es), but 2 were started: leave it out, or start 1" in told
    together(args, tmp_path / "run")
    told = together([*args, "--seed", "5"], tmp_path / "run", status=2)
    assert told.count("holds a run with other settings: ") == 1  # the first process found it, the other knows


def test_devices_without_a_launcher(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    args = prepared(tmp_path, [RTN])
    assert main([*args, "--trainer.devices", "2"]) == 2
    message = capsys.readouterr().err
    assert message.count("\n") == 1
    assert "trainer.devices 2 means 2 process(es), but one was started: run torchrun --nproc-per-node 2" in message


@pytest.mark.parametrize(
    ("environment", "given", "expected"),
    [
        ({}, {}, {"devices": 1}),
        ({}, {"devices": 2}, {}),
        ({"WORLD_SIZE": "4", "LOCAL_WORLD_SIZE": "4"}, {"devices": "auto"}, {"devices": 4}),
        ({"WORLD_SIZE": "4", "LOCAL_WORLD_SIZE": "2"}, {"num_nodes": 1}, {"devices": 2, "num_nodes": 2}),
        ({"SLURM_NTASKS": "6", "SLURM_NNODES": "2", "SLURM_JOB_NAME": "x"}, {}, {"devices": 3, "num_nodes": 2}),
        ({"SLURM_NTASKS": "6", "SLURM_JOB_NAME": "interactive"}, {}, {"devices": 1}),
    ],
)
def test_the_launcher_decides(
    monkeypatch: pytest.MonkeyPatch, environment: dict[str, str], given: dict[str, Any], expected: dict[str, Any]
) -> None:
    for name in ("WORLD_SIZE", "LOCAL_WORLD_SIZE", "SLURM_NTASKS", "SLURM_NNODES", "SLURM_JOB_NAME"):
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    found = launch_arguments(given)
    strategy = found.pop("strategy", None)
    assert found == expected
    assert isinstance(strategy, BlockParallel) == (len(environment) > 0 and "devices" in found and found["devices"] > 1)


def test_another_strategy_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(UserError, match="trainer.strategy 'fsdp' does not go with several processes.*leave it out"):
        launch_arguments({"strategy": "fsdp"})


def test_a_launcher_and_other_devices(monkeypatch: pytest.MonkeyPatch) -> None:
    class OneProcess:
        num_devices = num_nodes = 1

    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(UserError, match=r"trainer.devices 1 means 1 process\(es\), but 2 were started"):
        join(OneProcess(), {"devices": 1})  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("samples", "held_out", "message"),
    [(9, 4, "data.samples 9 .* 4 processes: give 8"), (8, 2, "data.held_out 2 is not divisible by the 4 processes")],
)
def test_shares_that_do_not_come_out_even(
    monkeypatch: pytest.MonkeyPatch, samples: int, held_out: int, message: str
) -> None:
    monkeypatch.setattr(processes, "count", lambda: 4)
    check_shares(8, 0)
    with pytest.raises(UserError, match=message):
        check_shares(samples, held_out)


def test_one_process_needs_no_group() -> None:
    tensor = torch.arange(3.0)
    assert processes.all_reduce_sum(tensor) is tensor
    assert processes.all_reduce_max(tensor) is tensor
    assert processes.gather_samples(tensor) is tensor
    assert processes.mine(tensor).equal(tensor)
    assert (processes.rank(), processes.count(), processes.first(lambda: 7)) == (0, 1, 7)
    assert not processes.all_agree(False)
    processes.part()


COLLECTIVES = """
import torch
import torch.distributed as dist
from omniq import processes
from omniq.errors import UserError
from omniq.streams import Streams

dist.init_process_group("gloo")
rank, whole = processes.rank(), torch.arange(20.0).view(10, 2)
assert processes.count() == 2
share = processes.mine(whole)
assert share.equal(whole[rank::2])
assert processes.gather_samples(share).equal(whole)
assert processes.all_reduce_sum(torch.tensor([1.0, rank])).tolist() == [2.0, 1.0]
assert processes.all_reduce_max(torch.tensor([1.0, rank])).tolist() == [1.0, 1.0]
assert processes.all_agree(True) and not processes.all_agree(rank == 0)
assert processes.first(lambda: {"rank": rank}) == {"rank": 0}
snapshot = Streams(3, share, share + 1).snapshot()
assert (snapshot is None) == (rank == 1)
assert rank == 1 or (snapshot.index == 3 and snapshot.full_precision.equal(whole) and snapshot.quantized.equal(whole + 1))

def mistake():
    raise UserError("told by the first")

try:
    processes.first(mistake)
except processes.ToldElsewhere:
    assert rank == 1
except UserError as error:
    assert rank == 0 and str(error) == "told by the first"
processes.part()
assert processes.count() == 1
print(f"process {rank} is done")
"""


def test_collectives(tmp_path: Path) -> None:
    script = tmp_path / "collectives.py"
    script.write_text(COLLECTIVES)
    command = [*TORCHRUN[:-2], str(script)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert "process 0 is done" in done.stdout
    assert "process 1 is done" in done.stdout


def test_a_snapshot_is_a_copy() -> None:
    stream = torch.zeros(5, 2, 3)
    streams = Streams.start(stream)
    snapshot = streams.snapshot()
    assert snapshot is not None
    stream += 1
    streams.quantized += 2
    assert not snapshot.full_precision.any()
    assert not snapshot.quantized.any()
