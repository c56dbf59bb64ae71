# SPDX-License-Identifier: Apache-2.0
"""Ownership of the folder ``out``: a run creates, replaces and removes files in it, so it must not be the user's.

A folder belongs to a run if it holds a fingerprint. A folder without a fingerprint must be empty, or hold only the
entries that a run creates before its fingerprint. Any other entry belongs to the user, or to a run whose settings are
lost; omniq refuses such a folder before it changes anything. In the folder of a run, omniq writes and removes only the
names below, the content of ``blocks``, ``current`` and ``tensorboard``, and ``model`` if an export wrote it
(``omniq.export.output_folder``).
"""

import os
import re
from pathlib import Path

from omniq.errors import UserError
from omniq.storage.atomic import check_possible

FINGERPRINT = "fingerprint.json"
GENERATED = "generated.safetensors"
MODEL_STAGES = "model_stages.json"
_RECORDS = (
    *(FINGERPRINT, "config.yaml", "environment.json", GENERATED, "streams.safetensors"),
    *("companions.json", "perplexity.json", "summary.json", "export.json", MODEL_STAGES),
)
_FOLDERS = ("blocks", "current", "tensorboard")
_BLOCK_FILE = re.compile(r"(\d{3,}|model)\..+")  # such as 007.safetensors, 007.0.csv and model.2.last.ckpt
_LONGEST = "current/." + 50 * "x"  # at least as long as any file name of a run, temporary names included
# Entries of a run that was killed before it wrote its fingerprint. The folders are empty at that time.
_BEFORE_FINGERPRINT = {"lock", "blocks", "current", f".{FINGERPRINT}.partial"}


def check_writable(path: Path) -> None:
    """Refuse a run directory that cannot be created or does not belong to a run, without changing it.

    Raises:
        UserError: the path is the working directory (which an empty ``out`` also means), a parent is a file or not
            writable, the paths of its files would be too long, the folder holds files but no run, or an entry of the
            run has the wrong type.
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
    check_empty_or_run(path)
    check_entries(path)


def is_run(path: Path) -> bool:
    """Return whether a folder belongs to a run, which its fingerprint shows."""
    return (path / FINGERPRINT).is_file()


def check_outside_runs(field: str, path: Path) -> None:
    """Refuse a path that is a run directory, or that a run reserves inside it. ``model`` may hold an export.

    Args:
        field: name of the setting, for the message.
        path: the path to check.

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
    """Return whether a file in ``blocks`` or ``current`` has the name of a file of a run."""
    return _BLOCK_FILE.fullmatch(path.name) is not None


def check_empty_or_run(path: Path) -> None:
    """Refuse a folder unless it belongs to a run, is empty, or does not exist.

    Raises:
        UserError: names the first file that does not belong to a run.
    """
    if (path / FINGERPRINT).exists():
        return
    for place in (path, path / "blocks", path / "current"):
        for entry in sorted(place.iterdir()) if place.is_dir() else ():
            if place != path or entry.name not in _BEFORE_FINGERPRINT:
                raise UserError(
                    f"out {path} holds {entry.relative_to(path)} and no {FINGERPRINT}, so it is not a run directory: "
                    "choose an empty or new folder"
                )


def check_entries(path: Path) -> None:
    """Refuse a run directory in which an entry has the wrong type: a link, a folder instead of a file, or the reverse.

    A link would redirect reads and removals to a path outside the run directory.

    Raises:
        UserError: names the entry.
    """
    for name in _FOLDERS:
        entry = path / name
        if entry.is_symlink() or (entry.exists() and not entry.is_dir()):
            raise UserError(f"{entry} is {_kind(entry)}, but the run keeps a folder there: move it away")
    own = [path / name for name in (*_RECORDS, "lock")]
    own += [entry for name in ("blocks", "current") if (path / name).is_dir() for entry in (path / name).iterdir()]
    for entry in own:
        if entry.is_symlink() or (entry.exists() and not entry.is_file()):
            raise UserError(f"{entry} is {_kind(entry)}, but the run keeps a file there: move it away")


def _kind(entry: Path) -> str:
    if entry.is_symlink():
        return "a link"
    if entry.is_dir():
        return "a folder"
    return "a file" if entry.is_file() else "a device"


def remove_partial_files(path: Path) -> None:
    """Remove partial files of a run that a killed process left behind."""
    for name in _RECORDS:
        (path / f".{name}.partial").unlink(missing_ok=True)
    for folder in ("blocks", "current"):
        for pattern in (".[0-9][0-9][0-9].*.partial", ".model.*.partial"):
            for leftover in (path / folder).glob(pattern):
                leftover.unlink()
