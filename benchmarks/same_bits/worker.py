# SPDX-License-Identifier: Apache-2.0
"""Runs of the ``omniq`` command in forked processes, without the seconds that starting Python and importing torch take.

A worker is a process that has imported what is slow, and forks for each order that it reads, a line of JSON:

    {"arguments": ["quantize", …], "processes": 1, "output": FILE, "aim": FILE or null}  ->  {"statuses": [0]}

A child is an ordinary ``python -m omniq``, in the environment that ``torchrun`` gives if there are several; when one of
them fails, the others are ended, as ``torchrun`` does. With an ``aim`` the run kills itself by SIGKILL as soon as that
file has got its name: a run writes every file beside its name, so both calls that rename are hooked.

NOTE: a child imports most of omniq after the fork, so the tree must not change while its runs are made.
"""

import json
import os
import runpy
import signal
import socket
import sys
import traceback
from collections.abc import Callable
from typing import Any, NoReturn


def serve() -> None:
    """Import, then carry out orders until there are no more."""
    import lightning  # noqa: F401
    import torch
    import transformers.models.llama.modeling_llama
    import transformers.tokenization_utils_tokenizers  # noqa: F401

    import omniq.__main__

    torch.set_num_threads(1)  # before the fork: a pool of threads would not survive it
    del sys.modules["omniq.__main__"]  # or runpy warns that it is there
    print(json.dumps({"omniq": omniq.__file__}), flush=True)
    for line in sys.stdin:
        print(json.dumps({"statuses": carry_out(json.loads(line))}), flush=True)


def carry_out(order: dict[str, Any]) -> list[int]:
    """Fork, and wait; the exit status of each process by rank, -9 for one that was killed."""
    count, statuses = order["processes"], {}
    port = free_port() if count > 1 else 0
    children: dict[int, int] = {}
    for rank in range(count):
        if (child := os.fork()) == 0:
            become(order, rank, port)
        children[child] = rank
    while children:
        child, status = os.wait()
        statuses[children.pop(child)] = code = os.waitstatus_to_exitcode(status)
        for other in children if code != 0 else ():
            os.kill(other, signal.SIGKILL)
    return [statuses[rank] for rank in range(count)]


def become(order: dict[str, Any], rank: int, port: int) -> NoReturn:
    """In a child: be one process of the run."""
    status = 70
    try:
        output = os.open(f"{order['output']}.{rank}", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
        os.dup2(output, 1)
        os.dup2(output, 2)
        if order["processes"] > 1:
            meet = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "GROUP_RANK": "0"}
            ranks = dict.fromkeys(("RANK", "LOCAL_RANK"), str(rank))
            sizes = dict.fromkeys(("WORLD_SIZE", "LOCAL_WORLD_SIZE"), str(order["processes"]))
            os.environ |= meet | ranks | sizes
        if order["aim"] is not None:
            aim = os.path.abspath(order["aim"])
            os.replace, os.rename = watched(os.replace, aim), watched(os.rename, aim)
        sys.argv[1:] = order["arguments"]
        runpy.run_module("omniq", run_name="__main__", alter_sys=True)
        status = 0
    except SystemExit as end:
        status = end.code if isinstance(end.code, int) else int(end.code is not None)
    except BaseException:  # the traceback is part of the output
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)


def watched(rename: Callable[..., None], aim: str) -> Callable[..., None]:
    """The same call, and the end of the process after it has made ``aim``."""

    def hook(source: Any, target: Any, **options: Any) -> None:
        rename(source, target, **options)
        if os.path.abspath(target) == aim:
            os.kill(os.getpid(), signal.SIGKILL)

    return hook


def free_port() -> int:
    """A port at which the processes of a run can meet."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


if __name__ == "__main__":
    del sys.path[0]  # the folder of this script, whose modules are nothing to omniq
    serve()
