# SPDX-License-Identifier: Apache-2.0
"""Processor time until a command line prints help, refuses a mistake, or reports on a run; trees in turns.

    git worktree add ../before COMMIT
    python benchmarks/start_time . ../before                      # median of five turns, seconds
    python benchmarks/start_time . ../before --run checkpoints/r  # with `omniq report` on a finished run

Processor time, user and system, of the process and of what it starts. The trees take turns, so that a machine that is
busy for a while slows all of them.
"""

import argparse
import os
import resource
import subprocess
import sys
from pathlib import Path
from statistics import median

RUN = ["quantize", "--model.path", "x", "--data.source", "Stdlib"]
COMMANDS = {
    "omniq --help": ["--help"],
    "omniq quantize --help": ["quantize", "--help"],
    "omniq evaluate --help": ["evaluate", "--help"],
    "epochs -3": [*RUN, "--stages+", "OmniQuant", "--stages.epochs", "-3"],
    "unknown key": [*RUN, "--scheme.wbits", "3"],
}


def processor_seconds(tree: Path, arguments: list[str]) -> float:
    """User and system time of one command line in a tree."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    command = [sys.executable, "-m", "omniq", *arguments]
    environment = {**os.environ, "PYTHONPATH": str(tree.resolve())}
    subprocess.run(command, env=environment, cwd=tree, capture_output=True)  # -m looks into the current folder first
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return after.ru_utime - before.ru_utime + after.ru_stime - before.ru_stime


def main() -> None:
    """Measure every command in every tree and print a row a command."""
    parser = argparse.ArgumentParser(description="Processor time of the first words of omniq's commands.")
    parser.add_argument("trees", type=Path, nargs="+", help="folders that hold the package omniq")
    parser.add_argument("--turns", type=int, default=5)
    parser.add_argument("--run", type=Path, help="a finished run, for `omniq report`")
    options = parser.parse_args()
    commands = dict(COMMANDS)
    if options.run is not None:
        commands["omniq report"] = ["report", "--run", str(options.run.resolve())]
    for name, arguments in commands.items():
        turns = [[processor_seconds(tree, arguments) for tree in options.trees] for _ in range(options.turns)]
        row = "  ".join(
            f"{tree}: {median(times):.2f} s"
            for tree, times in zip(options.trees, zip(*turns, strict=True), strict=True)
        )
        print(f"{name:24}{row}", flush=True)


if __name__ == "__main__":
    main()
