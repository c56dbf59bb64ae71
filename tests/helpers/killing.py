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
from typing import Any

from tests.helpers.forking import Forking, answer, become, orders


@dataclass(frozen=True)
class Attempt:
    """How an attempt ended.

    Args:
        status: of the process: 0 and up, or -9 if it was killed.
        output: what it printed, errors included.
        steps: training steps it made, as ``(block, step)``; those of the pass in which it died included.
        files: every file that got its final name, in order, relative to the run directory.
        seconds: from the first block on, for an attempt that reached it.
    """

    status: int
    output: str
    steps: list[tuple[str, int]]
    files: list[str]
    seconds: float

    @property
    def killed(self) -> bool:
        return self.status == -signal.SIGKILL


class Attempts(Forking):
    """The helper process that makes them, as a context manager."""

    module = "tests.helpers.killing"

    def run(
        self, args: list[str], out: Path, aim: tuple[str, str] | None = None, delay: float | None = None
    ) -> Attempt:
        """One attempt of a command line.

        Args:
            out: the run directory.
            aim: moment and file at which it is killed.
            delay: seconds, from the first block on, after which it is killed.
        """
        log = self.folder / "attempt"
        order = {"args": [*args, "--out", str(out)], "out": str(out), "aim": aim, "delay": delay, "log": str(log)}
        ended = self.ask(order)
        events = [json.loads(line) for line in log.with_suffix(".events").read_text().splitlines()]
        return Attempt(
            ended["status"],
            log.with_suffix(".output").read_text(),
            [tuple(event["step"]) for event in events if "step" in event],
            [event["file"] for event in events if "file" in event],
            ended["seconds"],
        )


def serve() -> None:
    """The helper: a child for each order, killed after its delay if it has one."""
    for order in orders():
        log, (begun, begin) = Path(order["log"]), os.pipe()
        log.with_suffix(".events").write_text("")
        child = os.fork()
        if child == 0:
            os.close(begun)
            become(order["args"], log.with_suffix(".output"), partial(_install, order, log, begin))
        os.close(begin)
        os.read(begun, 1)  # returns when the first block begins, or when the child ends
        os.close(begun)
        started = time.perf_counter()
        if order["delay"] is not None:
            time.sleep(order["delay"])
            os.kill(child, signal.SIGKILL)
        _, status = os.waitpid(child, 0)
        answer(status=os.waitstatus_to_exitcode(status), seconds=time.perf_counter() - started)


def _install(order: dict[str, Any], log: Path, begin: int) -> None:
    """Record steps and files, and kill where the order says."""
    from omniq.export.containers import shards
    from omniq.run import loop
    from omniq.stages.modules.end_to_end import EndToEndModule
    from omniq.stages.modules.omniquant import OmniQuantModule
    from omniq.storage.run_dir import RunDir

    out, events = Path(order["out"]).resolve(), log.with_suffix(".events")
    aim = tuple(order["aim"] or ())

    def record(**event: Any) -> None:
        with events.open("a") as file:
            file.write(json.dumps(event) + "\n")

    def die(path: str | os.PathLike[str] | None = None) -> None:
        if path is not None and Path(path).is_file():
            os.truncate(path, Path(path).stat().st_size // 2)
        os.kill(os.getpid(), signal.SIGKILL)

    def watched(rename: Callable[..., None]) -> Callable[..., None]:
        def hook(source: Any, target: Any, **options: Any) -> None:
            path = Path(os.path.abspath(target))
            name = str(path.relative_to(out)) if path.is_relative_to(out) else ""
            if aim in (("torn", name), ("before", name), ("late", name)):
                time.sleep(1 if aim[0] == "late" else 0)
                die(source if aim[0] == "torn" else None)
            rename(source, target, **options)
            record(file=name)
            if aim == ("after", name):
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
        if aim == ("torn", str(path.resolve().relative_to(out))):
            die(path)

    def calibrate(*args: Any) -> Any:
        os.close(begin)
        return real_calibrate(*args)

    def step(module: OmniQuantModule, indices: Any) -> Any:
        record(step=(f"{module.task.name} {module.settings.schedule}", module.batches.position))
        return real_step(module, indices)

    def model_step(module: EndToEndModule, indices: Any, batch_idx: int) -> Any:
        record(step=("model", module.batches.position))
        return real_model_step(module, indices, batch_idx)

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
    real_model_step, EndToEndModule.training_step = EndToEndModule.training_step, model_step


if __name__ == "__main__":
    serve()
