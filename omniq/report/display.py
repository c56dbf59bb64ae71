# SPDX-License-Identifier: Apache-2.0
"""What a person sees of a run: a bar over blocks, a bar over steps, one line for each finished block.

The bars tell the rate, the time left, and losses (of the steps) or memory (of the blocks), which get the room that is
left on the line. Time left over the blocks comes from those that were calibrated since the run was started last:
finished ones that a resumed run only passes through say nothing about the others.
"""

import math
import resource
import sys
from collections.abc import Mapping
from types import TracebackType

import torch
from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    ProgressColumn,
    Task,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.table import Column
from rich.text import Text

from omniq.report.console import plain_console


class RateColumn(ProgressColumn):
    """How many a second, or how long each takes."""

    def render(self, task: Task) -> Text:
        """``12.5/s`` or ``42.0 s each``; empty where there is nothing to tell it from."""
        speed = task.finished_speed or task.speed
        if not speed:
            return Text()
        return Text(f"{speed:.1f}/s" if speed >= 1 else f"{1 / speed:.1f} s each")


class Display:
    """Progress of a run; the lines of finished blocks also reach a pipe or log file, the bars only a terminal.

    Args:
        blocks: number of blocks.
        console: where to print.
    """

    def __init__(self, blocks: int, console: Console | None = None) -> None:
        self.console = console or plain_console()
        wide = self.console.width >= 100
        self.progress = Progress(
            TextColumn("{task.description}", markup=False),
            BarColumn(20 if wide else 10),
            MofNCompleteColumn(),
            *([TimeElapsedColumn()] if wide else []),
            TimeRemainingColumn(),
            RateColumn(),
            TextColumn("{task.fields[detail]}", markup=False, table_column=Column(no_wrap=True, ratio=1)),
            console=self.console,
            speed_estimate_period=math.inf,  # rich would forget a block that took longer than this
            expand=True,
        )
        self._blocks = self.progress.add_task("blocks", total=blocks, detail="")
        self._steps = self.progress.add_task("steps", total=1, detail="", visible=False)
        self._done = 0
        self._calibrating: int | None = None

    def __enter__(self) -> "Display":
        self.progress.start()
        self._measure_from(0)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.progress.stop()

    def stage(self, index: int, name: str, done: int, total: int) -> None:
        """A stage of a block begins."""
        if index != self._done:  # those before it are not even passed through
            self._measure_from(index)
        self._calibrating = index
        self.progress.reset(
            self._steps, total=total, completed=done, visible=True, description=f"block {index} {name}", detail=""
        )
        self._begin(self._steps)

    def step(self, done: int, losses: Mapping[str, float]) -> None:
        """A step is done."""
        detail = "  ".join(f"{name} {value:.3e}" for name, value in losses.items())
        self.progress.update(self._steps, completed=done, detail=detail)

    def block(self, index: int, line: str) -> None:
        """A block is finished, now or in an earlier run."""
        self._done = index + 1
        if index == self._calibrating:
            self.progress.update(self._blocks, completed=self._done)
        else:
            self._measure_from(self._done)
        self.progress.update(self._blocks, detail=memory())
        self.console.print(f"block {index:3d}  {line}  {memory()}", highlight=False)

    def _measure_from(self, done: int) -> None:
        """So many blocks are done; how long one takes is measured from now on, on those that follow."""
        self._done = done
        (task,) = (task for task in self.progress.tasks if task.id == self._blocks)
        began = task.start_time
        self.progress.reset(self._blocks, completed=done)
        task.start_time = began  # the time since the start of the run goes on
        self._begin(self._blocks)

    def _begin(self, task: TaskID) -> None:
        """Let rich measure the first one of a task, too: it takes the time between two advances."""
        self.progress.advance(task, 0)


def memory() -> str:
    """Peak memory of this process so far: host, and GPU where there is one."""
    unit = 1 if sys.platform == "darwin" else 1024  # ru_maxrss is bytes there, KiB elsewhere
    text = f"peak {resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**30:.1f} GiB"
    if torch.cuda.is_available():
        text += f" + {torch.cuda.max_memory_allocated() / 2**30:.1f} GiB GPU"
    return text
