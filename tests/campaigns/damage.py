# SPDX-License-Identifier: Apache-2.0
"""Damage files of tiny runs and models at random: each damage is repaired, refused in a line, or changes nothing.

    python -m tests.campaigns.damage --files 5000 --processes 14 --seconds 500

One file is damaged, then a command reads the folder:

    finished, midway    a run that has ended, or was killed in its last stage: the same command again
    source              the model of the run that was killed: the same command again
    export              a run that has ended: ``omniq export`` in the other format
    report              a run that has ended: ``omniq report``
    new                 the model: a run from the start
    evaluate            the exported checkpoint: ``omniq evaluate``

The first four must end with the result of the undamaged files or with exit status 2 and a line, the others in status 0
or 2: a damaged model may be another valid one. A damaged companion file of the model (tokenizer, generation config) may
give other companion files in the checkpoint if a warning names it. A traceback, a hang, another status or another
result without a word is a fault. When the seconds are over, the script prints what it has found so far.
"""

import argparse
import hashlib
import os
import random
import re
import shutil
import sys
from collections import Counter
from pathlib import Path
from typing import Any

from tests.campaigns.workers import Desk, Fact, spread
from tests.helpers.recipes import stage
from tests.helpers.runs import SMALL, outcome, write_run

PER_JOB = 20
HANGS = 120.0  # seconds; a run takes one
STARTS = ("finished", "finished", "midway", "midway", "source", "export", "report", "new", "evaluate")
KINDS = ("truncate", "flip", "zero", "append", "empty", "garbage", "replace", "swap", "remove", "folder", "link")
RESULTS = ("refused", "made again", "unchanged result", "warned", "other model", "fault")
LISTS: dict[str, dict[str, Any]] = {  # by format
    "compressed-tensors": {"stages": [stage("QuantEase", sweeps=2), stage("LearnedRounding", epochs=2)]},
    "omniq": {
        "stages": [stage("OmniQuant", epochs=1), stage("QuantEase", sweeps=2), stage("LearnedRounding", epochs=2)],
        "scheme": {"name": "W3A16g16"},
    },
}


def damage(path: Path, others: list[Path], kind: str, draw: random.Random) -> None:
    """Damage one file in this way; ``others`` are the files of its folder."""
    content = bytearray(path.read_bytes())
    place = draw.randrange(len(content)) if content else 0
    if kind in ("swap", "replace"):
        alike = [other for other in others if other != path and other.suffix == path.suffix]
        content[:] = draw.choice(alike if kind == "swap" and alike else others).read_bytes()
    elif kind == "flip" and content:
        content[place] ^= 1 << draw.randrange(8)
    elif kind == "zero":
        content[place : place + 64] = bytes(len(content[place : place + 64]))
    elif kind == "truncate":
        del content[place:]
    elif kind == "append":
        content += draw.randbytes(16)
    elif kind in ("empty", "garbage"):
        content[:] = draw.randbytes(200 if kind == "garbage" else 0)
    path.unlink()
    if kind == "folder":
        path.mkdir()
    elif kind == "link":
        path.symlink_to("absent")
    elif kind != "remove":
        path.write_bytes(content)


def look(path: Path) -> str:
    """Describe the entry at a path, for a comparison."""
    return hashlib.sha256(path.read_bytes()).hexdigest() if path.is_file() else os.path.lexists(path) * "other"


def digests(folder: Path) -> dict[str, str]:
    """Every exported file but those for people, which tell times."""
    return {path.name: look(path) for path in sorted(folder.iterdir()) if path.suffix not in (".md", ".yaml")}


class Bench:
    """The undamaged folders of one list of stages, and what the commands make of them."""

    def __init__(self, form: str, desk: Desk) -> None:
        self.desk, self.folder = desk, desk.folder / form
        self.folder.mkdir()
        self.command = write_run(self.folder, model=SMALL, export={"format": form}, **LISTS[form])
        self.other = next(name for name in LISTS if name != form)
        last = f"current/001.{len(LISTS[form]['stages']) - 1}.last.ckpt"
        whole = self.attempt(self.command, self.folder / "finished")
        midway = self.attempt(self.command, self.folder / "midway", aim=("after", last))
        exported = self.attempt(self.export(self.folder / "finished"), self.folder / "exported")
        assert (whole.status, midway.killed, exported.status) == (0, True, 0), whole.output + exported.output
        shutil.copytree(self.folder / "source", self.folder / "kept")
        self.expected, self.exported = outcome(self.folder / "finished"), digests(self.folder / "exported")

    def attempt(self, args: list[str], out: Path, **options: Any) -> Any:
        return self.desk.attempts.run(args, out, limit=HANGS, **options)

    def export(self, run: Path) -> list[str]:
        """The command line of an export, without its folder."""
        return ["export", "--run", str(run), "--export.format", self.other]

    def lay_out(self, start: str) -> tuple[Path, Path, list[str]]:
        """Copy what is to be damaged: the root of it, and the command line with the value of its ``--out``."""
        trial, source, finished = self.folder / "trial", self.folder / "source", self.folder / "finished"
        for folder in (trial, source, self.folder / "result"):
            shutil.rmtree(folder, ignore_errors=True)
        (self.folder / "result.json").unlink(missing_ok=True)
        shutil.copytree(self.folder / "kept", source)
        if start != "new":
            shutil.copytree(self.folder / "midway" if start in ("midway", "source") else finished, trial)
        if start == "export":
            return trial, self.folder / "result", self.export(trial)
        if start == "evaluate":
            command = ["evaluate", "--config", self.command[-1], "--model.path", str(trial / "model")]
            return trial / "model", self.folder / "result.json", [*command, "--device", "cpu"]
        if start == "report":
            return trial, trial, ["report", "--run", str(trial)]
        return source if start in ("source", "new") else trial, trial, self.command

    def same(self, start: str, damaged: Path, warned: bool) -> bool:
        """Whether the result is that of the undamaged files, but for a damaged file that only people read.

        After a warning about a companion file, the checkpoint may have other companion files.
        """
        if start == "export":
            return digests(self.folder / "result") == self.exported
        if start == "report":
            return True
        found, expected = outcome(self.folder / "trial"), dict(self.expected)
        if damaged.suffix == ".csv":  # losses of a finished block
            found.pop(damaged.name, None)
            expected.pop(damaged.name, None)
        if warned:
            made = ("model/config.json", "model/model.safetensors")  # from the blocks; the other files are companions
            found, expected = (
                {key: value for key, value in each.items() if key in made or not key.startswith("model/")}
                for each in (found, expected)
            )
        return found == expected

    def trial(self, start: str, kind: str, draw: random.Random) -> None:
        """Damage one file and note what comes of it."""
        root, out, command = self.lay_out(start)
        every = sorted(path for path in root.rglob("*") if path.is_file() and "tensorboard" not in path.parts)
        path = draw.choice(every)
        damage(path, every, kind, draw)
        left, ended = look(path), self.attempt(command, out)
        name = f"{start:9} {re.sub('[0-9]{3}', 'NNN', str(path.relative_to(root)))}"
        fault, warned = "", start == "source" and f" {path.name} (" in " ".join(ended.output.split())
        if ended.hung or "Traceback" in ended.output or ended.status not in (0, 2):
            trace = "Traceback: " if "Traceback" in ended.output else ""
            result, fault = "fault", f"{trace}status {ended.status}: {ended.output[-600:]}"
        elif ended.status == 2 and ended.output.rstrip().rpartition("\n")[2].startswith("omniq: "):
            result = "refused"
        elif ended.status == 2:
            result, fault = "fault", f"refused in more than a line: {ended.output[-600:]}"
        elif start in ("new", "evaluate"):
            result = "other model"
        elif not self.same(start, path, warned):
            result, fault = "fault", f"another result without a word: {ended.output[-300:]}"
        elif warned:
            result = "warned"
        else:
            result = "made again" if look(path) != left else "unchanged result"
        said = {"fault": f"{name} {kind}: {fault}"} if fault else {}
        self.desk.note(file=name, kind=kind, result=result, **said)


def damage_many(job: tuple[int, int], desk: Desk) -> None:
    """A job: damage so many files, with draws from this seed."""
    files, seed = job
    form, draw = list(LISTS)[seed % len(LISTS)], random.Random(seed)
    if form not in desk.kept:
        desk.kept[form] = Bench(form, desk)
    for _ in range(files):
        if desk.open:
            desk.kept[form].trial(draw.choice(STARTS), draw.choice(KINDS), draw)


def table(facts: list[Fact], by: str) -> None:
    """Print a row for each file or for each way to damage it."""
    print(f"{by:50} {'damaged':>8}" + "".join(f"{result:>18}" for result in RESULTS))
    for name in [*sorted({fact[by] for fact in facts}), "all"]:
        tally = Counter(fact["result"] for fact in facts if name in ("all", fact[by]))
        print(f"{name:50} {tally.total():8}" + "".join(f"{tally[result]:18}" for result in RESULTS))
    print()


def main() -> int:
    """Share the files over the processes and print what came of them."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--files", type=int, default=5000)
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--seconds", type=float, default=1e6, help="print the tables after so long at most")
    options = parser.parse_args()
    sizes = [min(PER_JOB, options.files - begin) for begin in range(0, options.files, PER_JOB)]
    jobs = [(size, options.seed * 100_000 + number) for number, size in enumerate(sizes)]
    facts = spread(jobs, damage_many, options.processes, options.seconds)
    damaged = [fact for fact in facts if "file" in fact]
    for by in ("file", "kind"):
        table(damaged, by)
    faults = [fact["fault"] for fact in facts if "fault" in fact]
    print(*faults, sep="\n")
    tracebacks = sum("Traceback" in fault for fault in faults)
    print(f"{len(damaged)} damaged files, {len(faults)} faults, {tracebacks} of them tracebacks")
    return bool(faults)


if __name__ == "__main__":
    sys.exit(main())
