# SPDX-License-Identifier: Apache-2.0
"""Blocks and streams that are written while the calibration goes on."""

import threading
import time
from pathlib import Path
from typing import Any

import pytest

from omniq.blocks.placement import Location
from omniq.cli.command import main
from omniq.errors import UserError
from omniq.stages.modules.omniquant import OmniQuantModule
from omniq.storage.block_result import BlockResult
from omniq.storage.run_dir import RunDir
from omniq.storage.writer import Writer
from tests.helpers.runs import SMALL, omniquant, write_run

PLACES: list[Location] = ["device", "host", "disk"]


@pytest.mark.parametrize("learns", [False, True])
def test_run_writes_block_while_next_is_prepared(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, learns: bool) -> None:
    """The write of a block waits here for the next stage; gradient steps wait for the write."""
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
    """The writing thread must not call CUDA while the next block captures its graph."""
    args = write_run(tmp_path, model=SMALL, stages=[omniquant()], trainer={"accelerator": "gpu", "devices": 1})
    plain = RunDir.save_block
    seen: list[int] = []

    def save_block(folder: RunDir, index: int, result: BlockResult) -> None:
        assert threading.current_thread() is not threading.main_thread()
        tensors = [*result.tensors.values(), *(linear.codes for linear in result.linears.values())]
        tensors += [part for linear in result.linears.values() for part in (linear.scale, linear.zero_point)]
        assert all(tensor.device.type == "cpu" for tensor in tensors)
        seen.append(index)
        plain(folder, index, result)

    monkeypatch.setattr(RunDir, "save_block", save_block)
    assert main([*args, "--streams", place]) == 0
    assert seen == [0, 1]
