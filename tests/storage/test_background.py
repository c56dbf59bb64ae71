# SPDX-License-Identifier: Apache-2.0
"""What happens beside the calibration: blocks read ahead, blocks and streams written, and how much is alive at once."""

import gc
import threading
import time
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from omniq.blocks.placement import Location
from omniq.blocks.prefetch import blocks_ahead
from omniq.cli.command import main
from omniq.errors import UserError
from omniq.models.source import SourceModel
from omniq.stages.omniquant import OmniQuantModule
from omniq.storage.block_result import BlockResult
from omniq.storage.run_dir import RunDir
from omniq.storage.writer import Writer
from tests.helpers.runs import SMALL, omniquant, write_run

CPU = torch.device("cpu")
PLACES: list[Location] = ["device", "host", "disk"]


def test_run_holds_at_most_two_blocks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
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


@pytest.mark.parametrize("learns", [False, True])
def test_run_writes_block_while_next_is_prepared(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, learns: bool) -> None:
    """Its file waits here for the stage of the next block to begin, and steps by gradients wait for the file."""
    stage = omniquant() if learns else {"class_path": "omniq.stages.RTN"}
    args = write_run(tmp_path, model=SMALL, stages=[stage], evaluation=None, export={"format": "none"})
    begun, file = threading.Event(), tmp_path / "run/blocks/000.safetensors"
    save, current, step = RunDir.save_block, RunDir.current, OmniQuantModule.training_step

    def save_late(folder: RunDir, index: int, result: Any) -> None:
        if index == 0:
            assert begun.wait(10), "the next block has not begun"
            time.sleep(0.2 if learns else 0)
        save(folder, index, result)

    def begin(folder: RunDir, *args: Any) -> Any:
        if args[0] == 1:
            begun.set()
        return current(folder, *args)

    def step_on_what_is_written(module: OmniQuantModule, indices: Any) -> Any:
        assert module.task.index == 0 or file.exists()
        return step(module, indices)

    monkeypatch.setattr(RunDir, "save_block", save_late)
    monkeypatch.setattr(RunDir, "current", begin)
    monkeypatch.setattr(OmniQuantModule, "training_step", step_on_what_is_written)
    assert main(args) == 0
    assert file.exists()


def test_run_with_unwritable_block_ends_and_resumes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    args = write_run(tmp_path, model=SMALL, stages=[omniquant()], evaluation=None, export={"format": "none"})

    def full(folder: RunDir, index: int, result: Any) -> None:
        raise UserError(f"cannot write block {index}: the disk is full")

    with monkeypatch.context() as patch:
        patch.setattr(RunDir, "save_block", full)
        assert main(args) == 2
    assert "cannot write block 0: the disk is full" in capsys.readouterr().err
    left = sorted(path.name for path in (tmp_path / "run/current").iterdir())
    assert left == ["000.0.last.ckpt"]  # and neither a checkpoint of the next block nor the streams behind this one
    assert not (tmp_path / "run/streams.safetensors").exists()
    assert main(args) == 0


def test_blocks_ahead_reads_next_block_in_thread() -> None:
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


def test_blocks_ahead_reading_error_is_raised_where_block_is_needed() -> None:
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


def test_writer_keeps_order_and_raises_errors() -> None:
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
        writer.start(work, 4)
        with pytest.raises(UserError, match="the disk is full"):
            writer.wait()
        assert done == [1, 2, 3]  # what comes after an error may count on what failed
        writer.start(work, 5)
    assert done == [1, 2, 3, 5]
    with pytest.raises(UserError, match="the disk is full"), Writer() as writer:
        writer.start(fail)


@pytest.mark.gpu
@pytest.mark.parametrize("place", PLACES)
def test_run_on_cuda_writes_blocks_from_host_memory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, place: str
) -> None:
    """From host memory alone: the writer must not call CUDA while the next block captures its graph."""
    args = write_run(tmp_path, model=SMALL, stages=[omniquant()], trainer={"accelerator": "gpu", "devices": 1})
    plain = RunDir.save_block
    seen: list[int] = []

    def save_block(folder: RunDir, index: int, result: BlockResult) -> None:
        assert threading.current_thread() is not threading.main_thread()
        tensors = [*result.tensors.values(), *(linear.codes for linear in result.linears.values())]
        tensors += [part for linear in result.linears.values() for part in (linear.scale, linear.zero_point)]
        assert all(tensor.device == CPU for tensor in tensors)
        seen.append(index)
        plain(folder, index, result)

    monkeypatch.setattr(RunDir, "save_block", save_block)
    assert main([*args, "--streams", place]) == 0
    assert seen == [0, 1]
