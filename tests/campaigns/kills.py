# SPDX-License-Identifier: Apache-2.0
"""Kill tiny runs of every recipe's stage list at random moments and at every rename; compare what they end in.

    python -m tests.campaigns.kills --kills 1000 --processes 2

Each case is a stage list in one of the formats. It is run once without a kill. Then runs of it are killed by SIGKILL,
first before, in the middle of and after every file that gets a name, then after random times, and started again until
they end. A run that ends in other bits or that refuses to continue is a fault; the script prints them and exits 1.
"""

import argparse
import random
import sys
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tests.helpers.killing import Attempts
from tests.helpers.recipes import LONGER, recipe_sections
from tests.helpers.runs import SMALL, outcome, write_run

FORMATS = ("compressed-tensors", "omniq")


@dataclass
class Tally:
    """Kills, runs that ended after them, and faults."""

    kills: int = 0
    runs: int = 0
    faults: list[str] = field(default_factory=list)


def holds(sections: dict[str, Any], form: str) -> bool:
    """Whether a format can hold what the stages and the scheme make."""
    sparse = any("SpQR" in entry["class_path"] for entry in sections["stages"])
    return form == "omniq" or not (sparse or "KV" in sections["scheme"]["name"] or sections["scheme"].get("queries"))


def moments(files: list[str]) -> Iterator[tuple[str, str]]:
    """Every moment of every file of a whole run at which a kill is aimed."""
    for name in dict.fromkeys(files):
        if name:
            yield from ((moment, name) for moment in ("torn", "before", "after"))


def kill_case(name: str, sections: dict[str, Any], form: str, kills: int, seed: int, until: float) -> Tally:
    """Kill runs of one case so many times, or until a point in time (``time.time()``)."""
    tally, draw = Tally(), random.Random(seed)
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        command = write_run(folder, model=SMALL, **sections, export={"format": form})
        with Attempts(folder) as attempts:
            whole = attempts.run(command, folder / "whole")
            if whole.status != 0:
                return Tally(faults=[f"{name} {form}: the uninterrupted run failed: {whole.output[-500:]}"])
            expected, aims = outcome(folder / "whole"), list(moments(whole.files))
            draw.shuffle(aims)
            while tally.kills < kills and time.time() < until:
                out = folder / f"run{tally.runs}"
                for _ in range(draw.randint(1, 8)):  # kills of one run before it may end
                    aim = aims.pop() if aims else None
                    delay = None if aim else draw.uniform(0, whole.seconds)
                    tally.kills += attempts.run(command, out, aim=aim, delay=delay).killed
                last = attempts.run(command, out)
                tally.runs += 1
                if last.status != 0:
                    tally.faults.append(f"{name} {form}: refused to continue: {last.output[-500:]}")
                elif outcome(out) != expected:
                    tally.faults.append(f"{name} {form}: other bits after kills")
    return tally


def main() -> int:
    """Spread the kills over all cases and print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=1000)
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--seconds", type=float, default=1e9, help="start no further run after so long")
    options = parser.parse_args()
    until = time.time() + options.seconds
    lists = {**recipe_sections(), **LONGER}
    cases = [(name, part, form) for name, part in lists.items() for form in FORMATS if holds(part, form)]
    share = -(-options.kills // len(cases))
    with ProcessPoolExecutor(options.processes) as pool:
        jobs = [pool.submit(kill_case, *case, share, options.seed + number, until) for number, case in enumerate(cases)]
        tallies = [job.result() for job in jobs]
    for (name, _, form), tally in zip(cases, tallies, strict=True):
        print(f"{name:42} {form:20} {tally.kills:5} kills {tally.runs:4} runs {len(tally.faults):3} faults")
    faults = [fault for tally in tallies for fault in tally.faults]
    print(*faults, sep="\n")
    print(f"{sum(t.kills for t in tallies)} kills, {sum(t.runs for t in tallies)} runs, {len(faults)} faults")
    return bool(faults)


if __name__ == "__main__":
    sys.exit(main())
