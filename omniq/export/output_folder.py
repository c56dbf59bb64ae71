# SPDX-License-Identifier: Apache-2.0
"""The output folder of an export: a reader finds the old checkpoint or the new one, never a mixture.

    .<out>.partial/   all files are written here and flushed to the disk
    <out>             appears by a rename when the checkpoint is complete

If ``out`` holds an earlier export, it is moved to ``.<out>.previous`` between the two renames and then removed. A
process that is killed at any moment leaves the old export or the new one. The next export to the same place repairs any
leftovers. All other files there belong to the user and stay. A container tells which folders are exports (``is_ours``).
"""

import os
import shutil
from pathlib import Path

from omniq.errors import UserError
from omniq.export.containers.shards import writing
from omniq.export.registry import container_of
from omniq.storage.atomic import flush


def check_free(out: str | os.PathLike[str]) -> None:
    """Refuse a place where no checkpoint can be written; changes no file, so any process may call it at any time.

    Raises:
        UserError: a parent of ``out`` is a file, or ``out`` is not empty and not an export.
    """
    out = Path(out).resolve()
    if in_the_way := next((parent for parent in out.parents if parent.is_file()), None):
        raise UserError(f"cannot write {out}: {in_the_way} is a file: choose another folder")
    if out.exists() and not _is_export(out):
        raise UserError(f"cannot export to {out}: it is not an omniq export: choose an empty or new folder")


def check_output(out: str | os.PathLike[str]) -> None:
    """Make sure that a checkpoint can be written to ``out`` now, and repair the leftovers of a killed export.

    Raises:
        UserError: see ``check_free``, or the parent folder cannot be written.
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
    """The format name of the export in a folder, as users type it; None if the folder holds no export.

    Raises:
        CorruptFile: the file that records it is damaged.
    """
    container = container_of(Path(out))
    return None if container is None else container.format_of(Path(out))


def partial_of(out: Path) -> Path:
    """The hidden folder in which an export to ``out`` is written until it is complete."""
    return out.with_name(f".{out.name}.partial")


def _previous(out: Path) -> Path:
    return out.with_name(f".{out.name}.previous")


def _is_export(out: Path) -> bool:
    """True for an empty folder and for an export of omniq."""
    return out.is_dir() and (not any(out.iterdir()) or container_of(out) is not None)


def replace(partial: Path, out: Path) -> None:
    """Flush all files, then replace ``out`` by ``partial``."""
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
