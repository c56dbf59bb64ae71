# SPDX-License-Identifier: Apache-2.0
"""Whose folder ``out`` is: a run makes, replaces and removes files in it, so nothing of the user's may be there.

A folder is a run's if it holds a fingerprint. Without one it must be empty, or hold no more than what a run makes
before its fingerprint; anything else is the user's, or of a run whose settings nobody knows any more, and is refused
before anything is touched. In a run's folder only the names below are ever written or removed, with what is in
``blocks``, ``current`` and ``tensorboard``, and ``model`` if an export has filled it
(``omniq.export.output_folder``).
"""

import os
import re
from pathlib import Path

from omniq.errors import UserError
from omniq.storage.atomic import check_possible

FINGERPRINT = "fingerprint.json"
_RECORDS = (
    *(FINGERPRINT, "config.yaml", "environment.json", "streams.safetensors"),
    *("perplexity.json", "summary.json", "export.json"),
)
_FOLDERS = ("blocks", "current", "tensorboard")
_BLOCK_FILE = re.compile(r"\d{3,}\..+")  # such as 007.safetensors, 007.0.csv and 007.0.last.ckpt
# What there is of a run that was killed before it had a fingerprint; the folders are empty then.
_LONGEST = "current/." + 50 * "x"  # no shorter than any file of a run, temporary names included
_FIRST = {"lock", "blocks", "current", f".{FINGERPRINT}.partial"}


def check_writable(path: Path) -> None:
    """Refuse a run directory that could not be made or is not a run's, without touching it.

    Raises:
        UserError: the working directory itself, which an empty ``out`` means too; a file is in the way; there is no
            permission; its files would have paths that are too long; or it holds files, but no run.
    """
    if path == Path():
        raise UserError(
            "out is empty or '.', the working directory: give the run a folder of its own, such as checkpoints/run"
        )
    path = path.absolute()
    try:
        there = next(place for place in (path, *path.parents) if place.exists())
        place = path.resolve()
    except (OSError, RuntimeError, ValueError) as error:  # RuntimeError for a ring of links, ValueError for NUL
        reason = getattr(error, "strerror", None) or error
        raise UserError(f"out {path} cannot be written: {reason}; choose another folder") from error
    check_possible(path / _LONGEST)
    if not there.is_dir():
        raise UserError(f"out {path} cannot be written: {there} is a file; choose another folder")
    if not os.access(there, os.W_OK | os.X_OK):
        raise UserError(f"out {path} cannot be written: no permission in {there}; choose another folder")
    if not is_run(place):
        check_outside_runs("out", place)
    check_own(path)


def is_run(path: Path) -> bool:
    """Whether a folder is a run's, by its fingerprint."""
    return (path / FINGERPRINT).is_file()


def check_outside_runs(field: str, path: Path) -> None:
    """Refuse a run directory, and the places in one that a run keeps for itself; ``model`` may hold an export.

    Args:
        field: what the user calls the path.

    Raises:
        UserError: names the run directory.
    """
    for run in (path, *path.parents):
        inside = path.relative_to(run).parts
        name = re.sub(r"\.(.+)\.(partial|previous)", r"\1", inside[0]) if inside else ""
        own = not inside or name in (*_RECORDS, *_FOLDERS, "lock") or (name == "model" and inside != ("model",))
        if own and is_run(run):
            raise UserError(f"{field} {path}: it belongs to the run in {run}; choose a folder of its own")


def is_block_file(path: Path) -> bool:
    """Whether a file in ``blocks`` or ``current`` has a name that a run gives."""
    return _BLOCK_FILE.fullmatch(path.name) is not None


def check_own(path: Path) -> None:
    """Refuse a folder that is neither a run's nor empty nor still to be made.

    Raises:
        UserError: names the first file in it that is not a run's.
    """
    if (path / FINGERPRINT).exists():
        return
    for place in (path, path / "blocks", path / "current"):
        for entry in sorted(place.iterdir()) if place.is_dir() else ():
            if place != path or entry.name not in _FIRST:
                raise UserError(
                    f"out {path} holds {entry.relative_to(path)} and no {FINGERPRINT}, so it is no run to continue: "
                    "choose an empty or a new folder"
                )


def check_entries(path: Path) -> None:
    """Refuse a run directory in which a folder or a link stands where the run keeps a file, or the other way round.

    A link would lead reads and removals out of the run directory.

    Raises:
        UserError: names the entry.
    """
    for name in _FOLDERS:
        entry = path / name
        if entry.is_symlink() or (entry.exists() and not entry.is_dir()):
            raise UserError(f"{entry} is {_kind(entry)}, and the run keeps a folder there: move it away")
    own = [path / name for name in (*_RECORDS, "lock")]
    own += [entry for name in ("blocks", "current") if (path / name).is_dir() for entry in (path / name).iterdir()]
    for entry in own:
        if entry.is_symlink() or (entry.exists() and not entry.is_file()):
            raise UserError(f"{entry} is {_kind(entry)}, and the run keeps a file there: move it away")


def _kind(entry: Path) -> str:
    return (
        "a link"
        if entry.is_symlink()
        else "a folder"
        if entry.is_dir()
        else "a file"
        if entry.is_file()
        else "a device"
    )


def remove_partial_files(path: Path) -> None:
    """Remove what a process that was killed while it wrote has left of a run's own files."""
    for name in _RECORDS:
        (path / f".{name}.partial").unlink(missing_ok=True)
    for folder in ("blocks", "current"):
        for leftover in (path / folder).glob(".[0-9][0-9][0-9].*.partial"):
            leftover.unlink()
