# SPDX-License-Identifier: Apache-2.0
"""Interrupt tiny runs (SIGINT) at random moments, with more processes than cores; each must end, and continue.

    python -m tests.campaigns.interrupts --interrupts 100 --processes 28 --seconds 500

A run that is still there 20 seconds after its first interrupt is a fault. It is interrupted again, which makes it print
the stack of every thread. An interrupted run must end with exit status 130 and the line that says so, and the same
command must end with the bits of a run that was not interrupted.
"""

import argparse
import random
import shutil
import sys

from tests.campaigns.workers import Desk, spread
from tests.helpers.recipes import stage
from tests.helpers.runs import SMALL, outcome, write_run

PER_JOB = 10
STAGES = [stage("OutlierSuppression"), stage("OmniQuant", epochs=2)]
SAID = "omniq: interrupted; the same command continues this run\n"


def interrupt_many(job: tuple[int, int], desk: Desk) -> None:
    """A job: interrupt so many runs, at moments from this seed."""
    count, seed = job
    draw, folder = random.Random(seed), desk.folder / str(seed)
    folder.mkdir()
    command = write_run(folder, model=SMALL, stages=STAGES, scheme={"name": "W4A8"})
    whole = desk.attempts.run(command, folder / "whole")
    expected = outcome(folder / "whole")
    while count and desk.open:
        out = folder / "run"
        delay = draw.uniform(0, whole.seconds)
        made = desk.attempts.run(command, out, delay=delay, interrupt=True)
        if made.ending:
            count -= 1
            desk.note(ending=made.ending)
        in_order = made.status == 0 or (made.status == 130 and made.output.endswith(SAID))
        if made.hung or not in_order:
            ended = f"status {made.status} after {made.ending:.1f} s"
            desk.note(fault=f"interrupted after {delay:.2f} s: {ended}: {made.output}")
        if made.status == 130 and draw.random() < 0.5:
            continue  # the same run is interrupted again
        last = desk.attempts.run(command, out)
        if last.status != 0 or outcome(out) != expected:
            desk.note(fault=f"status {last.status} and other bits: {last.output[-500:]}")
        shutil.rmtree(out)
    shutil.rmtree(folder)


def main() -> int:
    """Spread the interrupts over the processes and print how long the runs took to end."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--interrupts", type=int, default=100)
    parser.add_argument("--processes", type=int, default=8)
    parser.add_argument("--seconds", type=float, default=1e6, help="print the result after so long at most")
    options = parser.parse_args()
    sizes = [min(PER_JOB, options.interrupts - begin) for begin in range(0, options.interrupts, PER_JOB)]
    facts = spread(
        [(size, number) for number, size in enumerate(sizes)], interrupt_many, options.processes, options.seconds
    )
    endings = sorted(fact["ending"] for fact in facts if "ending" in fact)
    faults = [fact["fault"] for fact in facts if "fault" in fact]
    print(*faults, sep="\n")
    print(f"{len(endings)} interrupts, {len(faults)} faults; seconds from the interrupt to the end:")
    if endings:
        print(f"median {endings[len(endings) // 2]:.2f}, longest {endings[-1]:.2f}")
    return bool(faults)


if __name__ == "__main__":
    sys.exit(main())
