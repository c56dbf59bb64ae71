# SPDX-License-Identifier: Apache-2.0
"""Jobs spread over forked workers, of which everything found so far is known at any moment.

A worker takes the next job, and writes each fact that it finds as a line of JSON at once. When the time is over, the
parent ends the workers and all their children, and reads the lines.
"""

import json
import multiprocessing
import os
import signal
import tempfile
import time
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from tests.campaigns import BEGUN
from tests.helpers.killing import Attempts

GRACE = 5.0  # seconds before the end of the time in which workers are ended
EVERY = 20.0  # seconds between two lines of progress
Fact = dict[str, Any]


class Desk:
    """The tools of a worker.

    Args:
        folder: of this worker alone.
        until: point in time (``time.time()``) after which no further attempt begins.
    """

    def __init__(self, folder: Path, until: float, attempts: Attempts) -> None:
        self.folder, self.until, self.attempts = folder, until, attempts
        self.kept: dict[str, Any] = {}  # by the jobs, for later ones
        self._facts = (folder / "facts.jsonl").open("a")

    @property
    def open(self) -> bool:
        """Whether there is time for another attempt."""
        return time.time() < self.until

    def note(self, **fact: Any) -> None:
        """Write down one fact."""
        print(json.dumps(fact), file=self._facts, flush=True)


def spread(jobs: Sequence[Any], work: Callable[[Any, Desk], None], processes: int, seconds: float) -> list[Fact]:
    """Have workers do the jobs until so many seconds after the start of the script, and return the facts.

    Args:
        jobs: in the order in which they begin.
        work: does a job; called in a forked process.
    """
    # A run is a single thread on the CPU, and looks nothing up in the network.
    os.environ |= {"OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false", "HF_HUB_OFFLINE": "1"}
    os.environ["CUDA_VISIBLE_DEVICES"] = ""
    fork, end, told = multiprocessing.get_context("fork"), BEGUN + seconds, BEGUN
    following, failed = fork.Value("i", 0), list[Fact]()
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as scratch:
        folders = [Path(scratch, str(number)) for number in range(processes)]
        workers = [
            fork.Process(target=_worker, args=(folder, jobs, work, following, end - GRACE)) for folder in folders
        ]
        for folder, worker in zip(folders, workers, strict=True):
            folder.mkdir()
            worker.start()
            os.setpgid(worker.pid or 0, worker.pid or 0)  # here and in the worker: whichever comes first
        while any(worker.is_alive() for worker in workers) and time.time() < end:
            time.sleep(0.1)
            if time.time() - told > EVERY:
                told = time.time()
                print(f"{told - BEGUN:.0f} s: job {following.value} of {len(jobs)}", flush=True)
        for worker in workers:
            if worker.is_alive():
                os.killpg(worker.pid or 0, signal.SIGKILL)  # the helper and its children belong to the group
            elif worker.exitcode:
                failed.append({"fault": f"a worker of the campaign ended with status {worker.exitcode}"})
            worker.join()
        return failed + [json.loads(line) for folder in folders for line in _lines(folder / "facts.jsonl")]


def _lines(path: Path) -> list[str]:
    """The whole lines of a file, which a kill may have cut short."""
    return path.read_text().split("\n")[:-1] if path.exists() else []


def _worker(folder: Path, jobs: Sequence[Any], work: Callable[[Any, Desk], None], following: Any, until: float) -> None:
    os.setpgid(0, 0)
    with Attempts(folder) as attempts:
        desk = Desk(folder, until, attempts)
        while desk.open:
            with following.get_lock():
                number = following.value
                following.value += number < len(jobs)
            if number >= len(jobs):
                return
            try:
                work(jobs[number], desk)
            except Exception:
                desk.note(fault=f"the campaign itself failed in job {number}: {traceback.format_exc()}")
                return
