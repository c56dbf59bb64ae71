# SPDX-License-Identifier: Apache-2.0
"""A folder in which one tree of omniq makes its runs, each by the command line in a process of its own.

sources/ text.txt configs/    what the runs read
finished/w4a4/                a run that went through
interrupted/w4a4@FILE/        one that was killed when it had written FILE (``-`` for ``/``)
resumed/w4a4@FILE/            the same after it was continued
record.json                   the digests
"""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import digests
from cases import CASES

_KILLED = Path(__file__).resolve().with_name("killed.py")
_TORCHRUN = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node")
_PATIENCE = 600  # seconds for one run
_DISCARDED = "; removed, "  # what a run says of a file that it cannot go on from


class RunFailed(Exception):
    """A run ended in another way than it should have; the message holds what it printed."""


class Ground:
    """The folder, and the tree whose runs are made there.

    Args:
        tree: a checkout of omniq; its package is imported from there, whatever is installed.
        folder: exists, and holds what ``cases.write_inputs`` writes.

    Raises:
        RunFailed: another omniq than that of the tree would be imported.
    """

    def __init__(self, tree: Path, folder: Path) -> None:
        self.folder = folder.resolve()
        self.environment = os.environ | {
            "PYTHONPATH": str(tree.resolve()),
            "OMP_NUM_THREADS": "1",  # sums inside a product depend on the number of threads
            "MKL_NUM_THREADS": "1",
            "CUDA_VISIBLE_DEVICES": "",
            "HF_HUB_OFFLINE": "1",
            "TORCHINDUCTOR_CACHE_DIR": str(self.folder / ".compiled"),
        }
        where = self._python("-c", "import omniq; print(omniq.__file__)").stdout.strip()
        if not Path(where).is_relative_to(tree.resolve()):
            raise RunFailed(f"omniq would come from {where}, not from {tree}")

    def finish(self, case: str, out: str) -> digests.Digests:
        """Run a case to its end, from its start or from wherever it was interrupted, and digest what it leaves.

        Raises:
            RunFailed: it does not end well, finds a file damaged, or writes a finished block anew.
        """
        before = digests.of_files(self.folder / out / "blocks", "*.safetensors")
        done = self._python(*self._launcher(case), "-m", "omniq", *self._arguments(case, out))
        said = done.stdout + done.stderr
        if done.returncode != 0 or _DISCARDED in said:
            raise RunFailed(f"{out}: exit status {done.returncode}\n{said[-4000:]}")
        after = digests.of_files(self.folder / out / "blocks", "*.safetensors")
        if not before.items() <= after.items():
            raise RunFailed(f"{out}: a finished block was made again\n{said[-4000:]}")
        return digests.of_run(self.folder / out)

    def interrupt(self, case: str, file: str, out: str) -> None:
        """Start a case, and kill it when it has written a file of its run directory.

        Raises:
            RunFailed: it has ended without.
        """
        aim = f"{out}/{file}"
        done = self._python(*self._launcher(case), str(_KILLED), aim, *self._arguments(case, out))
        if done.returncode == 0 or not (self.folder / aim).exists():
            raise RunFailed(f"{aim}: exit status {done.returncode}, not killed\n{(done.stdout + done.stderr)[-4000:]}")

    def copy(self, run: str, to: str) -> None:
        """Copy a run directory."""
        shutil.copytree(self.folder / run, self.folder / to)

    def _launcher(self, case: str) -> tuple[str, ...]:
        processes = CASES[case].processes
        return (*_TORCHRUN, str(processes)) if processes > 1 else ()

    def _arguments(self, case: str, out: str) -> tuple[str, ...]:
        return "quantize", "--config", f"configs/{case}.yaml", "--out", out

    def _python(self, *arguments: str) -> "subprocess.CompletedProcess[str]":
        command = [sys.executable, *arguments]
        return subprocess.run(
            command, cwd=self.folder, env=self.environment, capture_output=True, text=True, timeout=_PATIENCE
        )
