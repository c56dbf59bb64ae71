# SPDX-License-Identifier: Apache-2.0
"""Where a checkpoint goes, so that a reader finds the old one or the new one, never a mixture.

    .<out>.partial/   everything is written here, flushed to the disk
    <out>             appears by a rename when all of it is there

An ``out`` that holds an earlier export is moved to ``.<out>.previous`` for the instant between two renames and removed
after. A process killed at any moment leaves the old export or the new one; what it leaves beside them is put right by
the next export to the same place. All other files there are the user's and stay. A container tells which folders are
exports (``is_ours``).
"""

import os
import shutil
from pathlib import Path

from omniq.errors import UserError
from omniq.export.containers.shards import writing
from omniq.export.registry import container_of
from omniq.storage.atomic import check_possible, flush


def check_free(out: str | os.PathLike[str]) -> None:
    """Refuse a place that a checkpoint cannot take; nothing is touched, so any process may ask at any time.

    Raises:
        UserError: a file is in the way, ``out`` holds something other than an export, or its path is too long.
    """
    out = Path(out).resolve()
    check_possible(_previous(out))
    if in_the_way := next((parent for parent in out.parents if parent.is_file()), None):
        raise UserError(f"cannot write {out}: {in_the_way} is a file; choose another folder")
    if out.exists() and not _is_export(out):
        raise UserError(f"export to {out}: it holds something that omniq did not export; choose an empty or new folder")


def check_output(out: str | os.PathLike[str]) -> None:
    """Make sure that a checkpoint can be written to ``out`` now, and put right what a killed export left beside it.

    Raises:
        UserError: as ``check_free`` says, or its folder cannot be written.
    """
    out = Path(out).resolve()
    partial, previous = partial_of(out), _previous(out)
    check_free(out)
    with writing(out):
        out.parent.mkdir(parents=True, exist_ok=True)
        if previous.exists() and not out.exists():
            previous.rename(out)  # killed between the two renames: the old export is the last complete one
        for leftover in (partial, previous):
            if leftover.exists():
                shutil.rmtree(leftover)
        partial.mkdir()  # a probe: the folder can be written
        partial.rmdir()


def earlier_export(out: str | os.PathLike[str]) -> str | None:
    """The format of the export that a folder holds, by the name that users type; None if it holds none.

    Raises:
        CorruptFile: the file that records it is damaged.
    """
    container = container_of(Path(out))
    return None if container is None else container.format_of(Path(out))


def partial_of(out: Path) -> Path:
    """Where an export to ``out`` is written until it is complete; hidden, as no folder of a user's is by chance."""
    return out.with_name(f".{out.name}.partial")


def _previous(out: Path) -> Path:
    return out.with_name(f".{out.name}.previous")


def _is_export(out: Path) -> bool:
    """An empty folder, or one that an export of omniq has filled."""
    return out.is_dir() and (not any(out.iterdir()) or container_of(out) is not None)


def replace(partial: Path, out: Path) -> None:
    """Flush everything, then put ``partial`` in the place of ``out``."""
    previous = _previous(out)
    with writing(out):
        for path in [*partial.rglob("*"), partial]:
            flush(path)
        if out.exists():
            out.rename(previous)
        partial.rename(out)
        flush(out.parent)
        if previous.exists():
            shutil.rmtree(previous)
