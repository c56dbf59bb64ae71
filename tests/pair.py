# SPDX-License-Identifier: Apache-2.0
"""Runs of two processes without the seconds that ``torchrun`` takes to start them.

A helper imports everything once and forks two children for each order, in the environment that ``torchrun`` gives them.
Unlike ``torchrun`` it does not end one when the other fails: whether a process notices is up to it.
"""

import json
import os
import signal
import socket
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any


@dataclass(frozen=True)
class Ends:
    """How two processes ended: their exit statuses (-9 if killed), and what each printed."""

    statuses: list[int]
    outputs: list[str]
    seconds_after_kill: float


class Pair:
    """The helper process, as a context manager.

    Args:
        folder: for what the processes print.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def __enter__(self) -> "Pair":
        self._helper = subprocess.Popen(
            [sys.executable, __file__], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        assert self._helper.stdin is not None
        self._helper.stdin.close()
        self._helper.wait()

    def run(self, args: list[str], kill_at: Path | None = None) -> Ends:
        """A command line in two processes; when a file appears, the second one is killed."""
        order = {"args": args, "kill_at": kill_at and str(kill_at), "folder": str(self.folder)}
        assert self._helper.stdin is not None
        assert self._helper.stdout is not None
        print(json.dumps(order), file=self._helper.stdin, flush=True)
        answer = json.loads(self._helper.stdout.readline())
        outputs = [(self.folder / f"output{rank}").read_text() for rank in range(2)]
        return Ends(answer["statuses"], outputs, answer["seconds"])


def serve() -> None:
    """The helper: import everything, then fork twice for each order that comes in."""
    import torch

    torch.set_num_threads(1)  # before the fork: a pool of threads would not survive it
    import omniq.pipeline  # noqa: F401
    from omniq.cli import quiet

    quiet()
    for line in sys.stdin:
        order = json.loads(line)
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        children = [os.fork() or _child(order, rank, port) for rank in range(2)]
        if order["kill_at"] is not None:
            while not Path(order["kill_at"]).exists():
                time.sleep(0.0005)
            os.kill(children[1], signal.SIGKILL)
        begun = time.perf_counter()
        statuses = [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children]
        print(json.dumps({"statuses": statuses, "seconds": time.perf_counter() - begun}), flush=True)


def _child(order: dict[str, Any], rank: int, port: int) -> int:
    """Never returns: one process of a run."""
    status = 70
    try:
        output = os.open(Path(order["folder"]) / f"output{rank}", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(output, 1)
        os.dup2(output, 2)
        sys.stdin = open(os.devnull)  # noqa: SIM115
        numbers = {"RANK": rank, "LOCAL_RANK": rank, "GROUP_RANK": 0, "WORLD_SIZE": 2, "LOCAL_WORLD_SIZE": 2}
        os.environ |= {name: str(value) for name, value in numbers.items()}
        os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
        from omniq import cli

        status = cli.main(order["args"])
    except BaseException:  # the traceback is part of the output
        import traceback

        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)


if __name__ == "__main__":
    serve()
