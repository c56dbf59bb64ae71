# SPDX-License-Identifier: Apache-2.0
"""Kill tiny runs of every recipe's stage list at random moments and at every rename; compare what they end in.

    python -m tests.campaigns.kills --kills 1000 --processes 14 --seconds 500

Each case is a stage list in one of the formats. It is run once without a kill. Then runs of it are killed by SIGKILL up
to eight times each and started again until they end: first at every aimed moment, which is in the middle of, before and
after each time that a file gets its name, then after random times. A moment that no kill has met is aimed at again, and
the table counts those met. A run that ends in other bits, leaves unfinished files, refuses to continue or hangs is a
fault. The script prints the faults and exits 1. When its seconds are over, it prints what it has found so far.
"""

import argparse
import hashlib
import random
import re
import shutil
import sys
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from tests.campaigns.workers import Desk, Fact, spread
from tests.helpers.killing import Attempt
from tests.helpers.recipes import LONGER, recipe_sections
from tests.helpers.runs import SMALL, outcome, write_run

FORMATS = ("compressed-tensors", "omniq")
PARTS = 4  # jobs of a case, so that the last workers to end do not keep the others waiting
PER_RUN = 8  # kills of one run at most
TRIES = 4  # to meet an aimed moment
HANGS = 120.0  # seconds; a run takes one
KINDS = ("boundary", "rename")  # of moments
# What a block, or a stage that another one follows, leaves last.
BOUNDARY = re.compile(r"blocks/\d+\.safetensors|current/\d+\.\d+\.(block|result\.safetensors)")


class Aim(NamedTuple):
    """A moment of a file: of the first time that it gets its name, the second, ..."""

    moment: str
    name: str
    nth: int

    @property
    def kind(self) -> str:
        """Whether it is the boundary between two stages or two blocks, or another moment of a file."""
        return "boundary" if self.moment == "after" and BOUNDARY.fullmatch(self.name) else "rename"


Plan = Aim | float  # a moment, or seconds from the first block on


@dataclass(frozen=True)
class Part:
    """A job: a part of the kills of one case.

    Args:
        case: number of the case.
        sections: of the run.
        number: which of the ``PARTS`` of the case it is.
        random: kills after random times.
        aimed: whether it aims at moments, too.
    """

    case: int
    sections: dict[str, Any]
    number: int
    random: int
    aimed: bool


def holds(sections: dict[str, Any], form: str) -> bool:
    """Whether a format can hold what the stages and the scheme make."""
    sparse = any("SpQR" in entry["class_path"] for entry in sections["stages"])
    return form == "omniq" or not (sparse or "KV" in sections["scheme"]["name"] or sections["scheme"].get("queries"))


def moments(run: Path, files: list[str]) -> Iterator[Aim]:
    """Every moment of every file of a whole run at which a kill is aimed, in the order of the run."""
    times = Counter[str]()
    for name in files:
        if name:
            times[name] += 1
            yield from (Aim(moment, name, times[name]) for moment in ("torn", "before", "after"))
    yield from (Aim("torn", f"blocks/{path.name}", 1) for path in sorted((run / "blocks").glob("*.csv")))


class Case:
    """The runs of one job: the one without a kill, and those that are killed."""

    def __init__(self, part: Part, desk: Desk) -> None:
        self.part, self.desk, self.runs = part, desk, 0
        self.folder = desk.folder / f"{part.case}-{part.number}"
        self.folder.mkdir()
        self.command = write_run(self.folder, model=SMALL, **part.sections)
        self.draw = random.Random(part.case * PARTS + part.number)
        self.whole = self.attempt(self.folder / "whole")
        self.sound = self.whole.status == 0
        self.expected = outcome(self.folder / "whole") if self.sound else {}
        self.aims = list(moments(self.folder / "whole", self.whole.files)) if self.sound else []
        digest = hashlib.sha256(repr(sorted(self.expected.items())).encode()).hexdigest()
        self.note(digest=digest, aims=Counter(aim.kind for aim in set(self.aims)))

    def note(self, **fact: Any) -> None:
        self.desk.note(case=self.part.case, **fact)

    def attempt(self, out: Path, **options: Any) -> Attempt:
        """One attempt; a failure is a fault."""
        made = self.desk.attempts.run(self.command, out, limit=HANGS, **options)
        if made.hung or (made.status != 0 and not made.killed):
            how = "hung" if made.hung else f"ended with status {made.status}"
            self.note(fault=f"{how} ({options}): {made.output[-500:]}")
        return made

    def kill(self, plan: Sequence[Plan]) -> int:
        """Kill one run at these moments or after these delays, let it end and compare; returns how many were met."""
        out, met, made = self.folder / f"run{self.runs}", 0, self.whole
        for each in plan:
            if not self.desk.open:
                return met
            aimed = isinstance(each, Aim)
            made = self.attempt(out, **({"aim": each[:2], "nth": each.nth} if aimed else {"delay": each}))
            if not made.killed:
                break
            self.note(kill=each.kind if aimed else "random", at=each)
            met += 1
        if made.killed:
            made = self.attempt(out)
        self.runs += 1
        if made.status == 0:
            self.note(run=True)
            if outcome(out) != self.expected:
                self.note(fault=f"other bits after kills at {plan[: met + 1]}")
            elif left := [str(path.relative_to(out)) for path in out.rglob("*partial*")]:
                self.note(fault=f"{left} left after kills at {plan[: met + 1]}")
        shutil.rmtree(out)
        return met

    def kill_at_moments(self) -> None:
        """Kill at every moment of this part; each run meets some of them, in their order."""
        order = {aim: place for place, aim in reversed(list(enumerate(self.aims)))}
        mine = sorted(order)
        random.Random(self.part.case).shuffle(mine)
        mine.sort(key=lambda aim: aim.kind)  # boundaries first
        tries = dict.fromkeys(mine[self.part.number :: PARTS], TRIES)
        while tries and self.desk.open:
            # The second time of a file is counted from the start of a process, so it is the first moment of a run.
            first = max(tries, key=lambda aim: (tries[aim], aim.nth))
            others = [aim for aim in tries if aim.nth == 1 and order[aim] > order[first]]
            others = self.draw.sample(others, min(len(others), self.draw.randrange(PER_RUN)))
            plan = [first, *sorted(others, key=lambda aim: order[aim])]
            met = self.kill(plan)
            tries[first] -= 1
            for aim in plan:
                if aim in plan[:met] or not tries[aim]:
                    del tries[aim]

    def kill_at_random(self) -> None:
        """Kill after random times, as often as this part asks for."""
        left = self.part.random
        while left > 0 and self.sound and self.desk.open:
            delays = [self.draw.uniform(0, self.whole.seconds) for _ in range(self.draw.randint(1, PER_RUN))]
            left -= self.kill(delays[:left])


def kill_part(part: Part, desk: Desk) -> None:
    """Do a job."""
    case = Case(part, desk)
    if part.aimed:
        case.kill_at_moments()
    case.kill_at_random()
    shutil.rmtree(case.folder)


def table(names: list[str], facts: list[Fact]) -> list[str]:
    """Print a row for each case and their sum; return all faults."""
    faults = [f"{names[fact['case']] if 'case' in fact else ''} {fact['fault']}" for fact in facts if "fault" in fact]
    total = Counter[str]()
    print(f"{'case':62} {'random':>6} {'boundaries':>11} {'renames':>11} {'runs':>6} {'faults':>6}")
    for number, name in enumerate([*names, "all"]):
        mine = [fact for fact in facts if fact.get("case") == number]
        row = Counter(fact["kill"] for fact in mine if fact.get("kill") == "random")
        row.update(kind for kind, _ in {(fact["kill"], str(fact["at"])) for fact in mine if fact.get("kill") in KINDS})
        row.update(runs=sum("run" in fact for fact in mine), faults=sum("fault" in fact for fact in mine))
        wholes = [fact for fact in mine if "aims" in fact]
        row.update({f"all {kind}": wholes[0]["aims"].get(kind, 0) for kind in KINDS if wholes})
        if len({fact["digest"] for fact in wholes}) > 1:
            faults.append(f"{name} two runs without a kill differ")
        row = total if name == "all" else row
        total += row if name != "all" else Counter()
        met = [f"{row[kind]} of {row[f'all {kind}']}" for kind in KINDS]
        print(f"{name:62} {row['random']:6} {met[0]:>11} {met[1]:>11} {row['runs']:6} {row['faults']:6}")
    return faults


def main() -> int:
    """Spread the kills over all cases and print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=1000, help="after random times, over all cases")
    parser.add_argument("--only", choices=["moments", "random"], help="kill at all moments only, or after random times")
    parser.add_argument("--cases", default="", help="only cases whose name contains this")
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--seconds", type=float, default=1e6, help="print the table after so long at most")
    options = parser.parse_args()
    lists = {**recipe_sections(), **LONGER}
    cases = {
        f"{name} {form}": part | {"export": {"format": form}}
        for name, part in lists.items()
        for form in FORMATS
        if holds(part, form) and options.cases in f"{name} {form}"
    }
    kills = 0 if options.only == "moments" else -(-options.kills // (len(cases) * PARTS))
    jobs = [
        Part(case, sections, number, kills, options.only != "random")
        for number in range(PARTS)
        for case, sections in enumerate(cases.values())
    ]
    facts = spread(jobs, kill_part, options.processes, options.seconds)
    faults = table(list(cases), facts)
    print(*faults, sep="\n")
    kills = sum("kill" in fact for fact in facts)
    print(f"{kills} kills, {sum('run' in fact for fact in facts)} runs that ended after them, {len(faults)} faults")
    return bool(faults)


if __name__ == "__main__":
    sys.exit(main())
