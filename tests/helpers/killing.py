# SPDX-License-Identifier: Apache-2.0
"""Runs that SIGKILL ends after a delay, or at a chosen moment of a chosen file.

Each attempt is an ordinary run of the command line in a forked child (``forking``).

    with Attempts(folder) as attempts:
        attempts.run(args, aim=("torn", "blocks/001.safetensors"))

Moments of a file, named relative to the run directory: ``torn`` (half of it is written, under its temporary name),
``before`` (all of it is, and it is about to get its name), ``late`` (the same, but a second passes before) and
``after`` (it just got it). For a CSV file, which is appended to, ``torn`` cuts the last row in two.
"""

import json
import os
import signal
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import FrameType
from typing import Any

from tests.helpers.forking import Forking, answer, become, orders

ENDS = 20.0  # seconds within which an interrupted run ends


@dataclass(frozen=True)
class Attempt:
    """How an attempt ended.

    Args:
        status: of the process: 0 and up, or -9 if it was killed.
        hung: True if it was killed because its limit was over, before it ended or came to its aim, or if it was still
            there ``ENDS`` seconds after an interrupt.
        output: what it printed, errors included.
        steps: training steps it made, as ``(block, step)``; those of the pass in which it died included.
        files: every file that got its final name, in order, relative to the run directory.
        seconds: from the first block on, for an attempt that reached it.
        ending: seconds from the interrupt, or the kill after a delay, to its end.
    """

    status: int
    output: str
    steps: list[tuple[str, int]]
    files: list[str]
    seconds: float
    hung: bool = False
    ending: float = 0.0

    @property
    def killed(self) -> bool:
        """Whether it was killed at its aim or after its delay."""
        return self.status == -signal.SIGKILL and not self.hung


class Attempts(Forking):
    """The helper process that makes them, as a context manager."""

    module = "tests.helpers.killing"

    def run(
        self,
        args: list[str],
        out: Path,
        aim: tuple[str, str] | None = None,
        nth: int = 1,
        delay: float | None = None,
        limit: float = 0,
        interrupt: bool = False,
    ) -> Attempt:
        """One attempt of a command line.

        Args:
            args: the command line, without ``--out``.
            out: the run directory, or another value of ``--out``; ``report`` has none.
            aim: moment and file at which it is killed.
            nth: the time of the file at which it is killed: 2 for the second time that it gets its name.
            delay: seconds, from the first block on, after which it is killed.
            limit: seconds after which it is killed if it has no delay or has not begun the first block; 0 for none.
            interrupt: after the delay, send SIGINT instead: again if it has not ended after ``ENDS`` seconds, and then
                kill it.
        """
        log = self.folder / "attempt"
        place = [] if args[0] == "report" else ["--out", str(out)]
        order = {"args": [*args, *place], "out": str(out), "aim": aim, "nth": nth, "delay": delay, "limit": limit}
        ended = self.ask({**order, "interrupt": interrupt, "log": str(log)})
        events = [json.loads(line) for line in log.with_suffix(".events").read_text().splitlines()]
        return Attempt(
            ended["status"],
            log.with_suffix(".output").read_text(),
            [tuple(event["step"]) for event in events if "step" in event],
            [event["file"] for event in events if "file" in event],
            ended["seconds"],
            ended["hung"],
            ended["ending"],
        )


def serve() -> None:
    """The helper: a child for each order, killed or interrupted after its delay or its limit if it has one."""
    child, strikes, planned, interrupt = 0, list[float](), False, False

    def strike(number: int, frame: FrameType | None) -> None:
        gentle = interrupt and planned and len(strikes) < 2
        os.kill(child, signal.SIGINT if gentle else signal.SIGKILL)
        strikes.append(time.perf_counter())
        signal.setitimer(signal.ITIMER_REAL, ENDS)

    signal.signal(signal.SIGALRM, strike)
    for order in orders():
        strikes, planned, interrupt = [], False, order["interrupt"]
        log, (begun, begin) = Path(order["log"]), os.pipe()
        log.with_suffix(".events").write_text("")
        child = os.fork()
        if child == 0:
            signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background job ignores it
            os.close(begun)
            become(order["args"], log.with_suffix(".output"), partial(_install, order, log, begin))
        signal.setitimer(signal.ITIMER_REAL, order["limit"])
        os.close(begin)
        os.read(begun, 1)  # returns when the first block begins, or when the child ends
        os.close(begun)
        started = time.perf_counter()
        if order["delay"] is not None:
            planned = not strikes
            signal.setitimer(signal.ITIMER_REAL, max(order["delay"], 1e-6))
        os.waitid(os.P_PID, child, os.WEXITED | os.WNOWAIT)  # its number stays taken until the timer has stopped
        signal.setitimer(signal.ITIMER_REAL, 0)
        _, status = os.waitpid(child, 0)
        ended = time.perf_counter()
        answer(
            status=os.waitstatus_to_exitcode(status),
            seconds=ended - started,
            hung=len(strikes) > planned,
            ending=ended - strikes[0] if strikes else 0,
        )


def _install(order: dict[str, Any], log: Path, begin: int) -> None:
    """Record steps and files, and kill where the order says."""
    from omniq.export.containers import shards
    from omniq.run import loop
    from omniq.stages.modules.omniquant import OmniQuantModule
    from omniq.storage.run_dir import RunDir

    out, events = Path(order["out"]).resolve(), log.with_suffix(".events")
    aim, times = tuple(order["aim"] or ()), 0  # how often the file of the aim was about to get its name

    def record(**event: Any) -> None:
        with events.open("a") as file:
            file.write(json.dumps(event) + "\n")

    def die(path: str | os.PathLike[str] | None = None) -> None:
        if path is not None and Path(path).is_file():
            os.truncate(path, Path(path).stat().st_size // 2)
        os.kill(os.getpid(), signal.SIGKILL)

    def within(target: Any) -> str:
        path = Path(os.path.abspath(target))
        return str(path.relative_to(out)) if path.is_relative_to(out) else ""

    def watched(rename: Callable[..., None]) -> Callable[..., None]:
        def hook(source: Any, target: Any, **options: Any) -> None:
            nonlocal times
            name = within(target)
            times += aim[1:] == (name,)
            moment = aim[0] if aim[1:] == (name,) and times == order["nth"] else None
            if moment in ("torn", "before", "late"):
                time.sleep(1 if moment == "late" else 0)
                die(source if moment == "torn" else None)
            rename(source, target, **options)
            record(file=name)
            if moment == "after":
                die()

        return hook

    def flush(handle: int) -> None:
        real_flush(handle)
        for path in (out / "blocks").glob("*.csv"):
            name = str(path.relative_to(out))
            if aim == ("torn", name) and os.path.samestat(os.fstat(handle), path.stat()) and path.stat().st_size > 40:
                os.truncate(path, path.stat().st_size - 7)
                die()

    def save(tensors: Any, path: Path, **options: Any) -> None:
        real_save(tensors, path, **options)
        if aim == ("torn", within(path)):
            die(path)

    def calibrate(*args: Any) -> None:
        os.close(begin)
        real_calibrate(*args)

    def step(module: OmniQuantModule, indices: Any) -> Any:
        record(step=(f"{module.task.name} {module.settings.schedule}", module.batches.position))
        return real_step(module, indices)

    def save_streams_async(folder: RunDir, *streams: Any) -> None:
        real_keep(folder, *streams)
        if aim[1:] == ("streams.safetensors",):  # or the next block would have got somewhere, sometimes
            folder.flush()

    real_flush, real_save, real_calibrate, real_keep, real_step = (
        os.fsync,
        shards.save_file,
        loop.calibrate,
        RunDir.save_streams_async,
        OmniQuantModule.training_step,
    )
    os.replace, os.rename, os.fsync = watched(os.replace), watched(os.rename), flush
    shards.save_file, loop.calibrate = save, calibrate
    RunDir.save_streams_async, OmniQuantModule.training_step = save_streams_async, step


if __name__ == "__main__":
    serve()
