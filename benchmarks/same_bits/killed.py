# SPDX-License-Identifier: Apache-2.0
"""The ``omniq`` command in a process that kills itself by SIGKILL as soon as a file has got its name.

    python benchmarks/same_bits/killed.py run/blocks/000.safetensors quantize --config run.yaml

A run writes every file beside its name and renames it, so both calls that rename are hooked.
"""

import os
import runpy
import signal
import sys
from collections.abc import Callable
from typing import Any


def watched(rename: Callable[..., None], aim: str) -> Callable[..., None]:
    """The same call, and the end of the process after it has made ``aim``."""

    def hook(source: Any, target: Any, **options: Any) -> None:
        rename(source, target, **options)
        if os.path.abspath(target) == aim:
            os.kill(os.getpid(), signal.SIGKILL)

    return hook


if __name__ == "__main__":
    aim = os.path.abspath(sys.argv.pop(1))
    del sys.path[0]  # the folder of this script, whose modules are nothing to omniq
    os.replace, os.rename = watched(os.replace, aim), watched(os.rename, aim)
    runpy.run_module("omniq", run_name="__main__", alter_sys=True)
