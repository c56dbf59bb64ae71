# SPDX-License-Identifier: Apache-2.0
"""What a person sees of a run: a bar over blocks, a bar over steps, one line for each finished block."""

import resource
import sys
from collections.abc import Mapping
from types import TracebackType

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn


class Display:
    """Progress of a run; the lines of finished blocks also reach a pipe or log file, the bars only a terminal.

    Args:
        blocks: number of blocks.
        console: where to print.
    """

    def __init__(self, blocks: int, console: Console | None = None) -> None:
        self.console = console or Console()
        self.progress = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[detail]}"),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
            console=self.console,
        )
        self._blocks = self.progress.add_task("blocks", total=blocks, detail="")
        self._steps = self.progress.add_task("steps", total=1, detail="", visible=False)

    def __enter__(self) -> "Display":
        self.progress.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.progress.stop()

    def stage(self, index: int, name: str, done: int, total: int) -> None:
        """A stage of a block begins."""
        self.progress.reset(
            self._steps, total=total, completed=done, visible=True, description=f"block {index} {name}", detail=""
        )

    def step(self, done: int, losses: Mapping[str, float]) -> None:
        """A step is done."""
        detail = "  ".join(f"{name} {value:.3e}" for name, value in losses.items())
        self.progress.update(self._steps, completed=done, detail=detail)

    def block(self, index: int, line: str) -> None:
        """A block is finished, now or in an earlier run."""
        self.progress.update(self._blocks, completed=index + 1, detail=memory())
        self.console.print(f"block {index:3d}  {line}  {memory()}", highlight=False)


def memory() -> str:
    """Peak memory of this process so far: host, and GPU where there is one."""
    unit = 1 if sys.platform == "darwin" else 1024  # ru_maxrss is bytes there, KiB elsewhere
    text = f"peak {resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**30:.1f} GiB"
    if torch.cuda.is_available():
        text += f" + {torch.cuda.max_memory_allocated() / 2**30:.1f} GiB GPU"
    return text
