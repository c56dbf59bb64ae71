# SPDX-License-Identifier: Apache-2.0
"""Damage files of tiny runs at random and start the run again: each damage is repaired, refused in a line, or harmless.

    python -m tests.campaigns.damage --files 5000 --processes 2

Three folders are damaged: a finished run, a run that was killed in its second stage, and the source model. After each
damage the same command runs again. It must end with the result of the undamaged run (the damaged file was made again),
or with exit status 2 and one line. A traceback, or another result without a word, is a fault.
"""

import argparse
import random
import shutil
import sys
import tempfile
import time
from collections import Counter
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

from tests.helpers.killing import Attempts
from tests.helpers.recipes import stage
from tests.helpers.runs import SMALL, outcome, write_run

STAGES = [stage("QuantEase", sweeps=2), stage("LearnedRounding", epochs=2)]
# Text for people: a change in it changes no result, and each start writes it anew or never reads it. The losses of a
# finished block (``.csv``) are such text, too.
RECORDS = ("summary.json", "environment.json", "config.yaml", "README.md", "recipe.yaml", "lock")


def damage(path: Path, others: list[Path], draw: random.Random) -> str:
    """Change one file; returns what was done to it."""
    content = bytearray(path.read_bytes())
    place = draw.randrange(len(content)) if content else 0
    kind = draw.choice(["truncate", "flip", "zero", "append", "empty", "garbage", "replace", "remove"])
    if kind == "truncate":
        path.write_bytes(content[:place])
    elif kind == "flip" and content:
        content[place] ^= 1 << draw.randrange(8)
        path.write_bytes(content)
    elif kind == "zero" and content:
        content[place : place + 64] = bytes(len(content[place : place + 64]))
        path.write_bytes(content)
    elif kind == "append":
        path.write_bytes(content + draw.randbytes(16))
    elif kind == "empty":
        path.write_bytes(b"")
    elif kind == "garbage":
        path.write_bytes(draw.randbytes(200))
    elif kind == "replace":
        shutil.copy(draw.choice(others), path)
    elif kind == "remove":
        path.unlink()
    return kind


def same(out: Path, expected: dict[str, Any], path: Path) -> bool:
    """Whether a run has the expected outcome, but for the damaged file if that holds losses."""
    found = outcome(out)
    return all(
        found.get(name) == value
        for name, value in expected.items()
        if not (path.suffix == ".csv" == Path(name).suffix and name == path.name)
    )


def damage_many(files: int, seed: int, until: float) -> tuple[Counter[str], list[str]]:
    """Damage so many files, one at a time, or until a point in time (``time.time()``)."""
    tally, faults, draw = Counter[str](), [], random.Random(seed)
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        command = write_run(folder, model=SMALL, stages=STAGES)
        with Attempts(folder) as attempts:
            assert attempts.run(command, folder / "whole").status == 0
            assert attempts.run(command, folder / "midway", aim=("after", "current/001.1.last.ckpt")).killed
            expected = outcome(folder / "whole")
            for number in range(files):
                if time.time() > until:
                    break
                tally["damaged"] += 1
                start = draw.choice(["whole", "whole", "midway", "source"])
                out = folder / "trial"
                shutil.rmtree(out, ignore_errors=True)
                if start != "source":
                    shutil.copytree(folder / start, out)
                root = folder / "source" if start == "source" else out
                shutil.rmtree(folder / "kept", ignore_errors=True)
                shutil.copytree(folder / "source", folder / "kept")
                every = sorted(path for path in root.rglob("*") if path.is_file() and "tensorboard" not in path.parts)
                path = draw.choice(every)
                name = f"{number} {start}/{path.relative_to(root)}"
                kind = damage(path, every, draw)
                ended = attempts.run(command, out)
                shutil.rmtree(folder / "source")
                (folder / "kept").rename(folder / "source")
                said = f"{name} {kind}: status {ended.status}: {ended.output[-300:]}"
                if "Traceback" in ended.output or ended.status not in (0, 2):
                    faults.append(said)
                elif ended.status == 2:
                    tally["refused"] += 1
                elif start == "source" or path.name in RECORDS or same(out, expected, path):
                    tally["repaired or harmless"] += 1
                else:
                    faults.append(f"undetected: {said}")
    return tally, faults


def main() -> int:
    """Share the files over the processes and print what came of them."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--files", type=int, default=5000)
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--seconds", type=float, default=1e9, help="damage no further file after so long")
    options = parser.parse_args()
    until = time.time() + options.seconds
    share = -(-options.files // options.processes)
    with ProcessPoolExecutor(options.processes) as pool:
        jobs = [pool.submit(damage_many, share, options.seed + number, until) for number in range(options.processes)]
        found = [job.result() for job in jobs]
    total = sum((tally for tally, _ in found), Counter[str]())
    faults = [fault for _, each in found for fault in each]
    print(*faults, sep="\n")
    print(f"{total.pop('damaged')} damaged files: {dict(total)}, {len(faults)} faults")
    return bool(faults)


if __name__ == "__main__":
    sys.exit(main())
