# SPDX-License-Identifier: Apache-2.0
"""The progress display of a run: a bar over blocks, a bar over steps, and one line for each finished block.

Both bars show the rate and the remaining time. In the rest of the line, the step bar shows losses and the block bar
shows memory. The remaining time of the blocks is estimated from the blocks that this process has calibrated. A resumed
run passes through finished blocks much faster, so these blocks do not count.
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
    """The rate of a task, or the time per item if the rate is below one per second."""

    def render(self, task: Task) -> Text:
        """Render ``12.5/s`` or ``42.0 s each``; empty text while the rate is unknown."""
        speed = task.finished_speed or task.speed
        if not speed:
            return Text()
        return Text(f"{speed:.1f}/s" if speed >= 1 else f"{1 / speed:.1f} s each")


class Display:
    """Display the progress of a run. Lines of finished blocks also go to a pipe or log file; bars need a terminal.

    Args:
        blocks: number of blocks.
        console: the console to print to.
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
            speed_estimate_period=math.inf,  # by default, rich drops blocks that take longer than 30 seconds
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

    def stage(self, index: int | None, name: str, done: int, total: int) -> None:
        """Show that a stage begins, on a block or, without an index, on the model."""
        if index is not None and index != self._done:  # the run starts at a later block and skips those before it
            self._measure_from(index)
        self._calibrating = index
        label = "model" if index is None else f"block {index}"
        self.progress.reset(
            self._steps, total=total, completed=done, visible=True, description=f"{label} {name}", detail=""
        )
        self._begin(self._steps)

    def step(self, done: int, losses: Mapping[str, float]) -> None:
        """Show that a step is done, with its losses by name."""
        detail = "  ".join(f"{name} {value:.3e}" for name, value in losses.items())
        self.progress.update(self._steps, completed=done, detail=detail)

    def block(self, index: int, line: str) -> None:
        """Show that a block is finished, by this process or by an earlier one."""
        self._done = index + 1
        if index == self._calibrating:
            self.progress.update(self._blocks, completed=self._done)
        else:
            self._measure_from(self._done)
        self.progress.update(self._blocks, detail=memory())
        self.console.print(f"block {index:3d}  {line}  {memory()}", highlight=False)

    def _measure_from(self, done: int) -> None:
        """Set the number of finished blocks, and restart the estimate of the time per block."""
        self._done = done
        (task,) = (task for task in self.progress.tasks if task.id == self._blocks)
        began = task.start_time
        self.progress.reset(self._blocks, completed=done)
        task.start_time = began  # keeps the elapsed time of the run
        self._begin(self._blocks)

    def _begin(self, task: TaskID) -> None:
        """Advance by 0, because rich measures between two advances: this includes the first item in the estimate."""
        self.progress.advance(task, 0)


def memory() -> str:
    """Describe the peak memory of this process: host, and GPU if one is present."""
    unit = 1 if sys.platform == "darwin" else 1024  # ru_maxrss is in bytes on macOS, in KiB elsewhere
    text = f"peak {resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**30:.1f} GiB"
    if torch.cuda.is_available():
        text += f" + {torch.cuda.max_memory_allocated() / 2**30:.1f} GiB GPU"
    return text
