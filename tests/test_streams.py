# SPDX-License-Identifier: Apache-2.0
"""Streams in every place, and how much is alive at once."""

import gc
import os
import threading
import time
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch
from runs import SMALL, omniquant, outcome, write_run
from stages import tiny_task
from torch import nn

from omniq import streams as streams_module
from omniq.background import Writer, blocks_ahead
from omniq.cli import main
from omniq.errors import UserError
from omniq.models.source import SourceModel
from omniq.quantizers.grid import Grid
from omniq.stages.base import BlockModule
from omniq.streams import Home, Place, Streams, call_block, like, propagate, sweep, take

CPU = torch.device("cpu")
PLACES: list[Place] = ["device", "host", "disk"]


@pytest.mark.parametrize("place", PLACES)
def test_a_stream_is_the_same_in_every_place(tmp_path: Path, place: Place) -> None:
    task = tiny_task(Grid(4), samples=5)
    home = Home(place, CPU, tmp_path)
    stream = home.take_in(task.inputs)
    assert list(tmp_path.iterdir()) == []  # a file on disk has no name
    mapped = stream.untyped_storage().filename
    assert (mapped is not None) == (place == "disk")
    assert (like(stream).untyped_storage().filename is not None) == (place == "disk")
    with torch.no_grad():
        expected = torch.cat([call_block(task.block, part, task.kwargs) for part in task.inputs.split(2)])
    propagate(task.block, stream, task.kwargs, task.precision, batch=2)
    assert torch.equal(stream, expected)
    for samples in (torch.tensor([3, 0]), slice(1, 4)):
        assert torch.equal(take(stream, samples, CPU), expected[samples])
    snapshot = Streams(1, stream, stream).snapshot()
    assert snapshot is not None
    assert torch.equal(snapshot.quantized, expected)
    assert (snapshot.quantized.untyped_storage().filename is not None) == (place == "disk")


@pytest.mark.parametrize("place", PLACES)
def test_batches_and_statistics_know_no_place(tmp_path: Path, place: Place) -> None:
    task = tiny_task(Grid(4), samples=4)
    outputs = task.run(task.inputs)
    home = Home(place, CPU, tmp_path)
    task.inputs, task.targets = home.take_in(task.inputs), home.take_in(task.targets)
    assert torch.equal(task.run(task.inputs), outputs)

    class Module(BlockModule):
        loader = finish = None  # type: ignore[assignment]

    inputs, targets = Module(task).batch(torch.tensor([2, 1]))
    assert torch.equal(inputs, task.inputs[[2, 1]])
    assert torch.equal(targets, task.targets[[2, 1]])


def test_a_sweep_gives_each_batch_and_its_place() -> None:
    task = tiny_task(Grid(4), samples=5)
    seen: list[tuple[slice, int]] = []
    sweep(task.block, task.inputs, task.kwargs, task.precision, 2, lambda place, out: seen.append((place, len(out))))
    assert seen == [(slice(0, 2), 2), (slice(2, 4), 2), (slice(4, 6), 1)]


@pytest.mark.parametrize(("host", "size", "expected"), [(100, 33, "host"), (100, 34, "disk"), (0, 1, "disk")])
def test_auto_goes_by_what_is_free(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, host: int, size: int, expected: str
) -> None:
    monkeypatch.setattr(streams_module, "_free_host_memory", lambda: host)
    assert Home.choose("auto", CPU, tmp_path, size).place == expected
    assert Home.choose("device", CPU, tmp_path, size).place == "device"
    monkeypatch.setattr(streams_module, "_free_device_memory", lambda device: 3 * size)
    assert Home.choose("auto", CPU, tmp_path, size).place == "device"


def test_free_memory_is_a_number() -> None:
    assert 0 < streams_module._free_host_memory() < 2**60 or not Path("/proc/meminfo").exists()
    assert streams_module._free_device_memory(CPU) == 0


def test_a_full_disk_is_said_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(handle: int, start: int, size: int) -> None:
        raise OSError(28, os.strerror(28))

    monkeypatch.setattr(os, "posix_fallocate", full)
    with pytest.raises(UserError, match="no room for a file of 0.0 GiB .*No space left.*set streams to host or device"):
        Home("disk", CPU, tmp_path).empty((2, 3), torch.float32)
    assert list(tmp_path.iterdir()) == []


def test_runs_are_equal_wherever_streams_live(tmp_path: Path) -> None:
    args = write_run(tmp_path, model=SMALL, stages=[omniquant(augmented_loss=True)], evaluation=None)
    outcomes = []
    for place in ("auto", *PLACES):
        assert main([*args, "--streams", place, "--out", str(tmp_path / place)]) == 0
        assert not list((tmp_path / place).glob("stream.*"))
        outcomes.append(outcome(tmp_path / place))
    assert all(found == outcomes[0] for found in outcomes[1:])


def test_two_blocks_are_alive_at_most(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The one that trains and the one that is read: a spy counts the blocks that nobody has let go of."""
    args = write_run(tmp_path, model={**SMALL, "num_hidden_layers": 6}, stages=[omniquant()], evaluation=None)
    alive: weakref.WeakSet[nn.Module] = weakref.WeakSet()
    most: list[int] = []
    plain = SourceModel.block

    def spy(source: SourceModel, *args: Any, **kwargs: Any) -> nn.Module:
        most.append(len(alive) + 1)  # with the one to come
        block = plain(source, *args, **kwargs)
        alive.add(block)
        return block

    monkeypatch.setattr(SourceModel, "block", spy)
    gc.disable()  # what is let go of must not have to wait for a chance collection
    try:
        assert main([*args, "--export.format", "none"]) == 0
    finally:
        gc.enable()
    assert len(most) == 6
    assert max(most) == 2


def test_blocks_are_read_ahead() -> None:
    class Slow:
        num_blocks = 3

        def __init__(self) -> None:
            self.read: list[tuple[int, bool]] = []

        def block(self, index: int) -> nn.Module:
            self.read.append((index, threading.current_thread() is threading.main_thread()))
            return nn.Linear(1, 1)

    source = Slow()
    for index, _ in blocks_ahead(source, 1, CPU):
        deadline = time.perf_counter() + 5
        while len(source.read) < min(2, index + 1) and time.perf_counter() < deadline:
            time.sleep(0.001)
        assert source.read[:2] == [(1, False), (2, False)]
    assert len(source.read) == 2


def test_reading_fails_where_the_block_is_wanted() -> None:
    class Broken:
        num_blocks = 2

        def block(self, index: int) -> nn.Module:
            if index == 1:
                raise UserError("the second block is damaged")
            return nn.Linear(1, 1)

    blocks = blocks_ahead(Broken(), 0, CPU)
    assert next(blocks)[0] == 0
    with pytest.raises(UserError, match="the second block is damaged"):
        next(blocks)


def test_the_writer_keeps_the_order_and_tells_of_errors() -> None:
    done: list[int] = []

    def work(number: int) -> None:
        time.sleep(0.02 / number)
        done.append(number)

    with Writer() as writer:
        for number in (1, 2, 3):
            writer.start(work, number)
    assert done == [1, 2, 3]

    def fail() -> None:
        raise UserError("the disk is full")

    with Writer() as writer:
        writer.start(fail)
        with pytest.raises(UserError, match="the disk is full"):
            writer.start(work, 4)
    with pytest.raises(UserError, match="the disk is full"), Writer() as writer:
        writer.start(fail)
