# SPDX-License-Identifier: Apache-2.0
"""The output folder of an export: a reader finds the old checkpoint or the new one, never a mixture.

    .<out>.partial/   all files are written here and flushed to the disk
    <out>             appears by a rename when the checkpoint is complete

If ``out`` holds an earlier export, it is moved to ``.<out>.previous`` between the two renames and then removed. A
process that is killed at any moment leaves the old export or the new one. The next export to the same place repairs any
leftovers.

Only files that omniq wrote are moved or removed (``manifest.py``): an earlier export if all its files are omniq's, and
a folder beside ``out`` if it carries the mark that omniq puts there. Folders of version 0.1 have no mark; their place
in a run directory identifies them. Any other file or folder belongs to the user. It is refused by name before anything
is touched.
"""

import os
from pathlib import Path

from omniq.errors import UserError
from omniq.export.containers.shards import writing
from omniq.export.manifest import (
    MANIFEST,
    REPLACED,
    entries,
    foreign_entries,
    is_marked,
    recorded_names,
    remove,
    weight_digests,
    write_manifest,
)
from omniq.export.registry import container_of
from omniq.storage.atomic import check_possible, flush
from omniq.storage.ownership import check_outside_runs, is_run


def resolved(out: str | os.PathLike[str]) -> Path:
    """Resolve ``out`` to an absolute path without links.

    Raises:
        UserError: the links form a ring, the path is too long, or ``out`` is the root of the file system.
    """
    try:
        place = Path(out).resolve()
        place.exists()
    except (OSError, RuntimeError, ValueError) as error:  # RuntimeError for a ring of links, ValueError for NUL
        reason = getattr(error, "strerror", None) or error
        raise UserError(f"export to {out}: {reason}; choose another folder") from error
    if not place.name:
        raise UserError(f"export to {out}: it is the root of the file system; choose an empty or new folder")
    return place


def check_free(out: str | os.PathLike[str]) -> None:
    """Refuse a place where no checkpoint can be written; changes no file, so any process may call it at any time.

    Raises:
        UserError: a parent of ``out`` is a file, ``out`` is not empty and not an export, ``out`` belongs to a run, its
            path is too long, or a file of the user is in the place of an unfinished export.
    """
    out = resolved(out)
    check_possible(_previous(out))
    if in_the_way := next((parent for parent in out.parents if parent.exists() and not parent.is_dir()), None):
        kind = "a file" if in_the_way.is_file() else "not a folder"
        raise UserError(f"cannot write {out}: {in_the_way} is {kind}: choose another folder")
    check_outside_runs("export to", out)
    if out.exists() and not _is_export(out):
        raise UserError(f"cannot export to {out}: it is not an omniq export: choose an empty or new folder")
    with writing(out):
        _check_leftover(partial_of(out), MANIFEST, out)
        _check_leftover(_previous(out), REPLACED, out)


def check_output(out: str | os.PathLike[str]) -> None:
    """Make sure that a checkpoint can be written to ``out`` now, and repair the leftovers of a killed export.

    Raises:
        UserError: see ``check_free``, or the parent folder cannot be written.
    """
    check_free(out)
    out = resolved(out)
    partial, previous = partial_of(out), _previous(out)
    with writing(out):
        out.parent.mkdir(parents=True, exist_ok=True)
        if previous.exists() and not out.exists():
            previous.rename(out)  # killed between the two renames: the old export is the last complete one
        (out / REPLACED).unlink(missing_ok=True)
        for leftover in (partial, previous):
            if leftover.exists():
                remove(leftover)
        partial.mkdir()  # a probe: the folder can be written
        partial.rmdir()


def check_replaceable(out: Path) -> None:
    """Refuse to replace an export whose folder contains a file of the user.

    Raises:
        UserError: names the first file that omniq did not write.
    """
    foreign = foreign_entries(out)
    if foreign:
        raise UserError(
            f"export to {out}: the export there must be replaced, and it holds {foreign[0]}, which omniq did not write;"
            " move that away or choose another folder"
        )


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


def make_partial(out: Path) -> Path:
    """Create the folder in which an export to ``out`` is written, with omniq's mark.

    Raises:
        UserError: the disk is full or cannot be written.
    """
    partial = partial_of(out)
    with writing(partial):
        partial.mkdir()
        try:
            write_manifest(partial, None)
        except UserError:
            partial.rmdir()
            raise
    return partial


def replace(partial: Path, out: Path) -> None:
    """Record the written files, flush all files, then replace ``out`` by ``partial``."""
    previous = _previous(out)
    names = [name for name in entries(partial) if name != MANIFEST]
    with writing(out):
        write_manifest(partial, names, weight_digests(partial, names))
        for path in [*partial.rglob("*"), partial]:
            flush(path)
        if out.exists() and any(out.iterdir()):
            check_replaceable(out)  # again, because the user may have added a file meanwhile
            (out / REPLACED).touch()
            flush(out)
            out.rename(previous)
        partial.rename(out)
        flush(out.parent)
        if previous.exists():
            remove(previous)


def _previous(out: Path) -> Path:
    return out.with_name(f".{out.name}.previous")


def _is_export(out: Path) -> bool:
    """True for an empty folder and for an export of omniq."""
    if not out.is_dir():
        return False
    return not any(out.iterdir()) or recorded_names(out) is not None or container_of(out) is not None


def _check_leftover(leftover: Path, mark: str, out: Path) -> None:
    """Refuse a folder at the place of an unfinished export if omniq did not create it.

    Args:
        leftover: the folder.
        mark: name of the file that marks it as omniq's.
        out: the folder of the export.
    """
    try:
        leftover.lstat()
    except FileNotFoundError:
        return
    why = "omniq did not make it"
    if leftover.is_dir() and not leftover.is_symlink():
        foreign = foreign_entries(leftover)
        known = is_marked(leftover, mark) or (out.name == "model" and is_run(out.parent))
        if not any(leftover.iterdir()) or (known and not foreign):
            return
        why = f"it holds {foreign[0]}, which omniq did not write" if foreign else why
    raise UserError(
        f"export to {out}: {leftover} stands where omniq keeps an unfinished export, and {why}; "
        "move it away or choose another folder"
    )
