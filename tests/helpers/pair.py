# SPDX-License-Identifier: Apache-2.0
"""Runs of two processes, without the time that ``torchrun`` takes to start them.

Two forked children (``forking``) run a command line in the environment that ``torchrun`` gives its processes. Unlike
there, neither is ended when the other fails: whether a process notices is up to it.
"""

import os
import signal
import socket
import time
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from tests.helpers.forking import Forking, answer, become, orders


@dataclass(frozen=True)
class Ends:
    """How two processes ended: their exit statuses (-9 if killed), and what each printed."""

    statuses: list[int]
    outputs: list[str]
    seconds_after_kill: float


class Pair(Forking):
    """The helper process that starts them, as a context manager."""

    module = "tests.helpers.pair"

    def run(self, args: list[str], kill_at: Path | None = None) -> Ends:
        """A command line in two processes; when a file appears, the second one is killed."""
        order = {"args": args, "kill_at": kill_at and str(kill_at), "folder": str(self.folder)}
        ended = self.ask(order)
        outputs = [(self.folder / f"output{rank}").read_text() for rank in range(2)]
        return Ends(ended["statuses"], outputs, ended["seconds"])


def serve() -> None:
    """The helper: two children for each order, the second killed when its file appears."""
    for order in orders():
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        children = []
        for rank in range(2):
            if (child := os.fork()) == 0:
                output = Path(order["folder"]) / f"output{rank}"
                become(order["args"], output, partial(_as_torchrun_sets, rank, port))
            children.append(child)
        if order["kill_at"] is not None:
            while not Path(order["kill_at"]).exists():
                time.sleep(0.0005)
            os.kill(children[1], signal.SIGKILL)
        begun = time.perf_counter()
        statuses = [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children]
        answer(statuses=statuses, seconds=time.perf_counter() - begun)


def _as_torchrun_sets(rank: int, port: int) -> None:
    """The environment of one process."""
    numbers = {"RANK": rank, "LOCAL_RANK": rank, "GROUP_RANK": 0, "WORLD_SIZE": 2, "LOCAL_WORLD_SIZE": 2}
    os.environ |= {name: str(value) for name, value in numbers.items()}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}


if __name__ == "__main__":
    serve()
