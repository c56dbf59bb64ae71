# SPDX-License-Identifier: Apache-2.0
"""Command lines in processes of their own, without the time to start Python and to import torch.

A helper process imports everything once and forks a child for each attempt. A child is an ordinary run of
``omniq.cli.main``; nothing of it survives but its files, its output and its exit status.

    class Mine(Forking): ...        in the test: ``self.ask(order)``, a dictionary each way
    for order in orders(): ...      in the helper, the same file run as a script: fork, and ``become`` in the child
"""

import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import TracebackType
from typing import Any, NoReturn, TypeVar

Self = TypeVar("Self", bound="Forking")


ROOT = Path(__file__).resolve().parents[2]


class Forking:
    """The helper process, as a context manager.

    Args:
        folder: for scratch files.
    """

    module: str  # that it runs: the one of the subclass

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def __enter__(self: Self) -> Self:
        pipes: Any = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
        self._helper = subprocess.Popen([sys.executable, "-m", self.module], cwd=ROOT, **pipes)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        assert self._helper.stdin is not None
        self._helper.stdin.close()
        self._helper.wait()

    def ask(self, order: dict[str, Any]) -> dict[str, Any]:
        """Send an order to the helper and wait for its answer."""
        assert self._helper.stdin is not None
        assert self._helper.stdout is not None
        print(json.dumps(order), file=self._helper.stdin, flush=True)
        answer: dict[str, Any] = json.loads(self._helper.stdout.readline())
        return answer


def orders() -> Iterator[dict[str, Any]]:
    """In the helper: import everything, then give each order that comes in."""
    import torch

    torch.set_num_threads(1)  # before the fork: a pool of threads would not survive it
    import omniq.run.loop  # noqa: F401
    from omniq.cli.quiet import quiet

    quiet()
    for line in sys.stdin:
        yield json.loads(line)


def answer(**facts: Any) -> None:
    """In the helper: what came of an order."""
    print(json.dumps(facts), flush=True)


def become(args: list[str], output: Path, prepare: Callable[[], None]) -> NoReturn:
    """In a forked child: be a run of the command line.

    Args:
        output: the file for all that it prints.
        prepare: called before.
    """
    status = 70
    try:
        printed = os.open(output, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(printed, 1)
        os.dup2(printed, 2)
        sys.stdin = open(os.devnull)  # noqa: SIM115
        from omniq.cli import main

        prepare()
        status = main(args)
    except BaseException:  # the traceback is part of the output
        import traceback

        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)
