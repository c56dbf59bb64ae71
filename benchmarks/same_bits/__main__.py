# SPDX-License-Identifier: Apache-2.0
"""Whether two trees of omniq make the same bits: the net under a change that must change nothing.

    python benchmarks/same_bits record --tree DIR --out old.json --keep old_runs    # before: dozens of tiny runs
    python benchmarks/same_bits record --tree DIR --out new.json                    # after
    python benchmarks/same_bits compare old.json new.json
    python benchmarks/same_bits continue --tree DIR --from old_runs                 # the old runs go on in the new tree

``record`` makes the runs of ``cases.py``: every stage list of ``configs/``, the other stages, both formats, LET, fixed
ranges, KV quantization, OPT, Qwen3, ``--blocks``, two processes; some a second time, killed and resumed. It digests
blocks, losses, perplexities and checkpoints (``digests.py``) to one JSON object, run -> item -> SHA-256. ``continue``
gives copies of kept run directories, finished ones and killed ones, to another tree: it must neither refuse them, nor
make a finished block again, nor end with other digests.

A CPU alone, one thread a run; digests of two machines, or of two versions of torch, are not to be compared.
"""

import argparse
import json
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import contextmanager
from fnmatch import fnmatch
from pathlib import Path

from cases import CASES, KILLS, write_inputs
from digests import Digests
from ground import Ground, RunFailed

Record = dict[str, Digests]

_SHOWN = 12  # differing items of a run; one wrong bit in the first block is in all that follows


def record(tree: Path, out: Path, keep: Path | None, only: str, jobs: int) -> int:
    """Make the runs, and write their digests.

    Args:
        tree: the checkout that makes them.
        out: the JSON file.
        keep: a new folder for the run directories.
        only: a pattern of names.
        jobs: how many at once.
    """
    if keep is not None and keep.exists():
        print(f"{keep} is there already: give a new folder", file=sys.stderr)
        return 2
    with _folder(keep) as folder:
        write_inputs(folder)
        with Ground(tree, folder, jobs) as ground:
            work = {case: _whole(ground, case) for case in CASES if fnmatch(case, only)}
            work |= {_label(*kill): _killed(ground, *kill) for kill in KILLS if fnmatch(_label(*kill), only)}
            found, failed = _all(work, jobs)
        for label, digests in found.items():  # a resumed run is the run that was never interrupted
            failed += _differences(label, found.get(_case(label), digests), digests)
        text = json.dumps(found, indent=1) + "\n"
        (folder / "record.json").write_text(text)
        shutil.rmtree(folder / "resumed", ignore_errors=True)
    out.write_text(text)
    return _verdict(f"{len(found)} runs recorded in {out}", failed)


def compare(ours: Path, theirs: Path) -> int:
    """Print every run and item in which two records differ."""
    one, other = (json.loads(path.read_bytes()) for path in (ours, theirs))
    failed = [f"{run}: only in {ours if run in one else theirs}" for run in sorted(one.keys() ^ other.keys())]
    for run in sorted(one.keys() & other.keys()):
        failed += _differences(run, one[run], other[run])
    return _verdict(f"{len(one.keys() & other.keys())} runs are in both", failed)


def go_on(tree: Path, kept: Path, only: str, jobs: int) -> int:
    """Continue copies of kept run directories, and compare how they end with the kept digests.

    Args:
        tree: the checkout that continues them.
        kept: what ``record --keep`` left; not changed.
        only: a pattern of names.
        jobs: how many at once.
    """
    expected: Record = json.loads((kept / "record.json").read_bytes())
    with _folder(None) as folder:
        shutil.copytree(kept, folder, dirs_exist_ok=True)
        runs = [path for kind in ("finished", "interrupted") for path in sorted((folder / kind).glob("*"))]
        names = {path.name: f"{path.parent.name}/{path.name}" for path in runs if fnmatch(path.name, only)}
        with Ground(tree, folder, jobs) as ground:
            found, failed = _all({name: _continued(ground, name, out) for name, out in names.items()}, jobs)
    for name, digests in found.items():
        failed += _differences(name, expected[_case(name)], digests)
    return _verdict(f"{len(names)} runs continued", failed)


def _whole(ground: Ground, case: str) -> Callable[[], Digests]:
    return lambda: ground.finish(case, f"finished/{case}")


def _continued(ground: Ground, name: str, out: str) -> Callable[[], Digests]:
    return lambda: ground.finish(_case(name), out)


def _killed(ground: Ground, case: str, file: str) -> Callable[[], Digests]:
    label = _label(case, file)

    def work() -> Digests:
        ground.interrupt(case, file, f"interrupted/{label}")
        ground.copy(f"interrupted/{label}", f"resumed/{label}")
        return ground.finish(case, f"resumed/{label}")

    return work


def _label(case: str, file: str) -> str:
    return f"{case}@{file.replace('/', '-')}"


def _case(label: str) -> str:
    return label.partition("@")[0]


def _all(work: dict[str, Callable[[], Digests]], jobs: int) -> tuple[Record, list[str]]:
    """Do all of it, a line each: the digests in the order given, and what failed."""
    found: Record = {}
    failed: list[str] = []
    begun = time.perf_counter()
    with ThreadPoolExecutor(jobs) as pool:
        futures = {pool.submit(each): name for name, each in work.items()}
        for future in as_completed(futures):
            name = futures[future]
            try:
                found[name] = future.result()
                said = f"{len(found[name])} items"
            except RunFailed as error:
                failed.append(f"{name}: {error}")
                said = "FAILED"
            print(f"{time.perf_counter() - begun:6.1f} s  {name}: {said}", flush=True)
    return {name: found[name] for name in work if name in found}, failed


def _differences(run: str, ours: Digests, theirs: Digests) -> list[str]:
    """At most one entry: the items that are not equal, in the order in which a run makes them."""
    order = list(ours | theirs)
    items = [item for item in order if ours.get(item) != theirs.get(item)]
    if not items:
        return []
    more = [f"… and {len(items) - _SHOWN} more"] if len(items) > _SHOWN else []
    return ["\n    ".join([f"{run}: {len(items)} of {len(order)} items", *items[:_SHOWN], *more])]


def _verdict(what: str, failed: list[str]) -> int:
    for entry in failed:
        print(f"DIFFERS  {entry}")
    print(f"{what}; {len(failed)} of them differ or failed" if failed else f"{what}; all is equal")
    return 1 if failed else 0


@contextmanager
def _folder(keep: Path | None) -> Iterator[Path]:
    """The folder to keep, or one that goes again."""
    if keep is not None:
        keep.mkdir(parents=True)
        yield keep
        return
    with tempfile.TemporaryDirectory(prefix="same_bits") as folder:
        yield Path(folder)


def main() -> int:
    """Read the command line and do what it says; 0 if all is equal, 1 if not."""
    summary, _, description = (__doc__ or "").partition("\n")
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser("same_bits", description=summary, epilog=description, formatter_class=raw)
    commands = parser.add_subparsers(dest="command", required=True)
    recording = commands.add_parser("record", help="make the tiny runs and write their digests")
    recording.add_argument("--out", type=Path, required=True, help="JSON file for the digests")
    recording.add_argument("--keep", type=Path, help="new folder for the run directories, for continue")
    comparing = commands.add_parser("compare", help="print what two records differ in; exit status 1 if anything")
    comparing.add_argument("records", type=Path, nargs=2, help="two JSON files that record wrote")
    continuing = commands.add_parser("continue", help="continue run directories of another tree")
    continuing.add_argument("--from", dest="kept", type=Path, required=True, help="folder that record --keep made")
    for command in (recording, continuing):
        command.add_argument("--tree", type=Path, required=True, help="checkout of omniq that makes the runs")
        command.add_argument("--only", default="*", help="pattern of names, such as 'opt-*'; all if not given")
        command.add_argument("--jobs", type=int, default=2, help="runs at once (default: 2)")
    given = parser.parse_args()
    if given.command == "compare":
        return compare(*given.records)
    try:
        if given.command == "record":
            return record(given.tree, given.out, given.keep, given.only, given.jobs)
        return go_on(given.tree, given.kept, given.only, given.jobs)
    except RunFailed as error:
        print(f"same_bits: {error}", file=sys.stderr)
        return 1


if __name__ == "__main__":
    sys.exit(main())
