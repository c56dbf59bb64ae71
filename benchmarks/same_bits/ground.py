# SPDX-License-Identifier: Apache-2.0
"""A folder in which one tree of omniq makes its runs, each by the command line in a process of its own.

The folder holds:

* ``sources/``, ``text.txt``, ``configs/``: what the runs read;
* ``finished/w4a4/``: a run that went through;
* ``interrupted/w4a4@FILE/``: one that was killed when it had written FILE (``-`` for ``/``);
* ``resumed/w4a4@FILE/``: a copy of that, which was continued;
* ``record.json``: the digests.
"""

import json
import os
import queue
import shutil
import subprocess
import sys
from pathlib import Path
from types import TracebackType
from typing import Any

import digests
from cases import CASES

_WORKER = Path(__file__).resolve().with_name("worker.py")
_DISCARDED = "; removed, "  # what a run says of a file that it cannot go on from


class RunFailed(Exception):
    """A run ended in another way than it should have; the message holds what it printed."""


class Ground:
    """The folder, and workers that make runs of a tree there; a context manager.

    Args:
        tree: a checkout of omniq; its package is imported from there, whatever is installed.
        folder: exists, and holds what ``cases.write_inputs`` writes.
        jobs: how many runs there can be at once.

    Raises:
        RunFailed: another omniq than that of the tree would be imported.
    """

    def __init__(self, tree: Path, folder: Path, jobs: int) -> None:
        self.tree, self.folder, self.jobs = tree.resolve(), folder.resolve(), jobs
        self._workers: queue.Queue[subprocess.Popen[str]] = queue.Queue()
        (self.folder / ".scratch").mkdir()

    def __enter__(self) -> "Ground":
        environment = os.environ | {
            "PYTHONPATH": str(self.tree),
            "OMP_NUM_THREADS": "1",  # sums inside a product depend on the number of threads
            "MKL_NUM_THREADS": "1",
            "CUDA_VISIBLE_DEVICES": "",
            "HF_HUB_OFFLINE": "1",
            "TORCHINDUCTOR_CACHE_DIR": str(self.folder / ".scratch" / "compiled"),
            "TORCHINDUCTOR_COMPILE_THREADS": "1",
        }
        pipes: dict[str, Any] = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
        for _ in range(self.jobs):
            worker = subprocess.Popen([sys.executable, str(_WORKER)], cwd=self.folder, env=environment, **pipes)
            self._workers.put(worker)
            where = self._answer(worker).get("omniq", "nowhere")
            if not Path(where).is_relative_to(self.tree):
                self.__exit__(None, None, None)
                raise RunFailed(f"omniq would come from {where}, not from {self.tree}")
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        while not self._workers.empty():
            self._workers.get().communicate()
        shutil.rmtree(self.folder / ".scratch")

    def finish(self, case: str, out: str) -> digests.Digests:
        """Run a case to its end, from its start or from wherever it was interrupted, and digest what it leaves.

        Raises:
            RunFailed: it does not end well, finds a file damaged, or writes a finished block anew.
        """
        before = digests.of_files(self.folder / out / "blocks", "*.safetensors")
        statuses, said = self._run(case, out, None)
        if any(statuses) or _DISCARDED in said:
            raise RunFailed(f"{out}: exit status {statuses}\n{said}")
        after = digests.of_files(self.folder / out / "blocks", "*.safetensors")
        if not before.items() <= after.items():
            raise RunFailed(f"{out}: a finished block was made again\n{said}")
        return digests.of_run(self.folder / out)

    def interrupt(self, case: str, file: str, out: str) -> None:
        """Start a case, and let it be killed when it has written a file of its run directory.

        Raises:
            RunFailed: it has ended without.
        """
        statuses, said = self._run(case, out, f"{out}/{file}")
        if -9 not in statuses or 0 in statuses:
            raise RunFailed(f"{out}: exit status {statuses}, not killed at {file}\n{said}")

    def copy(self, run: str, to: str) -> None:
        """Copy a run directory."""
        shutil.copytree(self.folder / run, self.folder / to)

    def _run(self, case: str, out: str, aim: str | None) -> tuple[list[int], str]:
        """Exit statuses of all processes of a run, and the end of what they print."""
        output = self.folder / ".scratch" / out.replace("/", ".")
        arguments = ["quantize", "--config", f"configs/{case}.yaml", "--out", out]
        order = {"arguments": arguments, "processes": CASES[case].processes, "output": str(output), "aim": aim}
        worker = self._workers.get()
        try:
            assert worker.stdin is not None
            print(json.dumps(order), file=worker.stdin, flush=True)
            statuses: list[int] = self._answer(worker)["statuses"]
        finally:
            self._workers.put(worker)
        said = "\n".join(path.read_text() for path in sorted(output.parent.glob(f"{output.name}.[0-9]")))
        return statuses, said[-4000:]

    def _answer(self, worker: "subprocess.Popen[str]") -> dict[str, Any]:
        assert worker.stdout is not None
        line = worker.stdout.readline()
        if not line:
            raise RunFailed("the worker has ended: see above")
        answer: dict[str, Any] = json.loads(line)
        return answer
