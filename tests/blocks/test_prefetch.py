# SPDX-License-Identifier: Apache-2.0
"""Blocks that are read ahead of the calibration, and how many of them are alive at once."""

import gc
import threading
import time
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from omniq.blocks.prefetch import blocks_ahead
from omniq.cli.command import main
from omniq.errors import UserError
from omniq.models.source import SourceModel
from tests.helpers.runs import SMALL, omniquant, write_run

CPU = torch.device("cpu")


def test_run_holds_at_most_two_blocks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One block trains and one is being read; a weak set counts the blocks that are alive."""
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
    assert len(most) == 7  # the self-test before the run reads the first block, too
    assert max(most) == 2


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
