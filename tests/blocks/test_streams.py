# SPDX-License-Identifier: Apache-2.0
"""Streams on a device, in host memory and on disk, and the choice between these places."""

import os
from pathlib import Path

import pytest
import torch

from omniq.blocks import placement
from omniq.blocks.forward import call_block, forward_stream, propagate
from omniq.blocks.placement import ActivationPlacement, Location, empty_like_stream, gather_samples
from omniq.blocks.streams import Streams
from omniq.calibration.module import BlockModule
from omniq.cli.command import main
from omniq.distributed import memory
from omniq.errors import UserError
from omniq.grid.affine import Grid
from tests.helpers.runs import SMALL, omniquant, outcome, write_run
from tests.helpers.stages import tiny_task

CPU = torch.device("cpu")
PLACES: list[Location] = ["device", "host", "disk"]


@pytest.mark.parametrize("place", PLACES)
def test_placed_stream_in_each_place_keeps_values(tmp_path: Path, place: Location) -> None:
    task = tiny_task(Grid(4), samples=5)
    chosen = ActivationPlacement(place, CPU, tmp_path)
    stream = chosen.place(task.inputs)
    assert list(tmp_path.iterdir()) == []  # a file on disk has no name
    mapped = stream.untyped_storage().filename
    assert (mapped is not None) == (place == "disk")
    assert (empty_like_stream(stream).untyped_storage().filename is not None) == (place == "disk")
    with torch.no_grad():
        expected = torch.cat([call_block(task.block, part, task.kwargs) for part in task.inputs.split(2)])
    propagate(task.block, stream, task.kwargs, task.precision, batch=2)
    assert torch.equal(stream, expected)
    for samples in (torch.tensor([3, 0]), slice(1, 4)):
        assert torch.equal(gather_samples(stream, samples, CPU), expected[samples])
    for copies, in_file in ((chosen.copy_folder, place == "disk"), (tmp_path, True)):
        snapshot = Streams(1, stream, stream).snapshot(copies)
        assert snapshot is not None
        assert torch.equal(snapshot.quantized, expected)
        assert (snapshot.quantized.untyped_storage().filename is not None) == in_file
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("place", PLACES)
def test_task_on_placed_streams_gives_same_batches_and_outputs(tmp_path: Path, place: Location) -> None:
    task = tiny_task(Grid(4), samples=4)
    outputs = task.run(task.inputs)
    chosen = ActivationPlacement(place, CPU, tmp_path)
    task.inputs, task.targets = chosen.place(task.inputs), chosen.place(task.targets)
    assert torch.equal(task.run(task.inputs), outputs)

    class Module(BlockModule):
        loader = finish = None  # type: ignore[assignment]

    inputs, targets = Module(task).batch(torch.tensor([2, 1]))
    assert torch.equal(inputs, task.inputs[[2, 1]])
    assert torch.equal(targets, task.targets[[2, 1]])


def test_forward_stream_reports_each_batch_with_its_slice() -> None:
    task = tiny_task(Grid(4), samples=5)
    seen: list[tuple[slice, int]] = []
    forward_stream(
        task.block, task.inputs, task.kwargs, task.precision, 2, lambda place, out: seen.append((place, len(out)))
    )
    assert seen == [(slice(0, 2), 2), (slice(2, 4), 2), (slice(4, 6), 1)]


@pytest.mark.parametrize(("host", "size", "expected"), [(100, 33, "host"), (100, 34, "disk"), (0, 1, "disk")])
def test_placement_auto_depends_on_free_memory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, host: int, size: int, expected: str
) -> None:
    monkeypatch.setattr(placement, "free_host_memory", lambda: 2 * host)
    assert ActivationPlacement.choose("auto", CPU, tmp_path, size).location == expected
    assert ActivationPlacement.choose("device", CPU, tmp_path, size).location == "device"
    monkeypatch.setattr(placement, "_free_device_memory", lambda device: 3 * size)
    assert ActivationPlacement.choose("auto", CPU, tmp_path, size).location == "device"


@pytest.mark.parametrize(
    ("asked", "size", "others", "place", "copy_on_disk"),
    [
        ("auto", 64, {}, "host", False),  # 3 streams of 64
        ("auto", 65, {}, "disk", False),  # of 128: torch pins powers of two
        ("auto", 16, {"processes": 4}, "host", False),
        ("auto", 16, {"processes": 5}, "disk", False),  # each of five takes 48
        ("auto", 64, {"count": 4}, "disk", False),
        ("auto", 32, {"saved": 104}, "host", False),  # 96 are taken by the streams
        ("auto", 32, {"saved": 105}, "host", True),
        ("host", 500, {"saved": 1}, "host", True),
        ("device", 500, {"saved": 200}, "device", False),  # the streams are in the memory of the GPU
        ("device", 500, {"saved": 201}, "device", True),
        ("disk", 1, {"saved": 1000}, "disk", False),
    ],
)
def test_placement_counts_streams_of_all_processes_and_saved_copy(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    asked: str,
    size: int,
    others: dict[str, int],
    place: str,
    copy_on_disk: bool,
) -> None:
    """The allocated streams of all processes of a machine count, then the copy that is saved."""
    monkeypatch.setattr(placement, "free_host_memory", lambda: 2 * 200)
    monkeypatch.setattr(placement, "_free_device_memory", lambda device: 0)
    chosen = ActivationPlacement.choose(asked, torch.device("cuda"), tmp_path, size, **others)
    assert (chosen.location, chosen.copy_on_disk) == (place, copy_on_disk)
    assert chosen.copy_folder == (tmp_path if place == "disk" or copy_on_disk else None)


def test_placement_on_cpu_counts_host_memory_for_each_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(placement, "free_host_memory", lambda: 2 * 200)
    assert not ActivationPlacement.choose("device", CPU, tmp_path, 50, saved=50).copy_on_disk
    assert ActivationPlacement.choose("device", CPU, tmp_path, 50, saved=51).copy_on_disk
    assert not ActivationPlacement.choose(
        "host", CPU, tmp_path, 50, saved=50
    ).copy_on_disk  # nothing is pinned without a GPU


def test_free_memory_of_machine_is_plausible_number() -> None:
    assert 0 < memory.free_host_memory() < 2**60 or not Path("/proc/meminfo").exists()
    assert placement._free_device_memory(CPU) == 0


def test_free_host_memory_in_container_is_limited(tmp_path: Path) -> None:
    assert memory.free_host_memory(tmp_path) == 2**62
    (tmp_path / "proc").mkdir()
    (tmp_path / "proc/meminfo").write_text("MemTotal:       8000 kB\nMemAvailable:   5000 kB\n")
    group = tmp_path / "sys/fs/cgroup"
    group.mkdir(parents=True)
    (group / "memory.max").write_text("max\n")
    (group / "memory.current").write_text("3000000\n")
    (group / "memory.stat").write_text("anon 1000000\ninactive_file 1500000\n")
    assert memory.free_host_memory(tmp_path) == 5_120_000
    (group / "memory.max").write_text("4000000\n")
    assert memory.free_host_memory(tmp_path) == 2_500_000  # what was read from files is given back
    (group / "memory.max").write_text("1000000\n")
    assert memory.free_host_memory(tmp_path) == 0


def test_placement_on_full_disk_is_refused_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(handle: int, start: int, size: int) -> None:
        raise OSError(28, os.strerror(28))

    monkeypatch.setattr(os, "posix_fallocate", full)
    with pytest.raises(UserError, match="no room for a file of 0.0 GiB .*No space left.*set streams to host or device"):
        ActivationPlacement("disk", CPU, tmp_path).empty((2, 3), torch.float32)
    assert list(tmp_path.iterdir()) == []


def test_quantize_with_each_stream_placement_gives_same_outcome(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    args = write_run(tmp_path, model=SMALL, stages=[omniquant(augmented_loss=True)], evaluation=None)
    outcomes = []
    for place in ("auto", *PLACES, "nowhere"):
        if place == "nowhere":  # the copy that is saved goes to files
            monkeypatch.setattr(placement, "free_host_memory", lambda: 0)
        assert main([*args, "--streams", place if place != "nowhere" else "host", "--out", str(tmp_path / place)]) == 0
        assert not list((tmp_path / place).glob("stream.*"))
        outcomes.append(outcome(tmp_path / place))
    assert all(found == outcomes[0] for found in outcomes[1:])


@pytest.mark.gpu
def test_free_host_memory_counts_pinned_memory_as_allocated(tmp_path: Path) -> None:
    """Pinned memory is allocated in powers of two; cached memory is returned before free memory is read."""

    def pinned(kind: str) -> int:
        return int(torch.cuda.host_memory_stats()[f"{kind}_bytes.current"])

    device = torch.device("cuda")
    torch.zeros(1, device=device)
    memory.free_host_memory()
    before = pinned("allocated")
    stream = ActivationPlacement("host", device, tmp_path).empty((3, 2**22), torch.float32)
    assert stream.is_pinned()
    assert pinned("allocated") - before == placement._allocated(stream.nbytes, device) == 2**26
    del stream
    memory.free_host_memory()
    if hasattr(torch.accelerator, "empty_host_cache"):
        assert pinned("allocated") == before


def test_streams_snapshot_is_copy() -> None:
    stream = torch.zeros(5, 2, 3)
    streams = Streams.start(stream)
    snapshot = streams.snapshot()
    assert snapshot is not None
    stream += 1
    streams.quantized += 2
    assert not snapshot.full_precision.any()
    assert not snapshot.quantized.any()
