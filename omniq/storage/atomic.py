# SPDX-License-Identifier: Apache-2.0
"""Atomic files: each is written beside its final name, flushed and renamed."""

import errno
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import BinaryIO

from omniq.errors import UserError

_NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS)


def expand_home(path: str | Path) -> Path:
    """A path with the home folder in the place of its ``~``, which a shell may not have seen.

    Raises:
        UserError: it names a user who has none here.
    """
    try:
        return Path(path).expanduser()
    except RuntimeError as error:
        raise UserError(f"{path}: there is no home folder of that user; give the path without ~") from error


def atomic_write(path: Path, *parts: bytes | memoryview) -> None:
    """Write beside ``path``, flush to disk, rename, flush the folder: ``path`` never holds half a file.

    Raises:
        UserError: the disk is full or the folder cannot be written; nothing is left beside ``path``.
    """
    temporary = path.with_name(f".{path.name}.partial")
    try:
        with temporary.open("wb") as file:
            for part in parts:
                file.write(part)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
        flush(path.parent)
    except OSError as error:
        with suppress(OSError):  # of a filesystem that has become read-only
            temporary.unlink()
        raise UserError(f"cannot write {path}: {error.strerror}; free the disk or choose another folder") from error


def flush(path: Path) -> None:
    """Wait until a file, or what a folder says of the names in it, is on the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    except OSError as error:
        nothing = error.errno in (errno.EINVAL, errno.ENOTSUP)  # some filesystems have nothing to flush of a folder
        if not nothing or not path.is_dir():
            raise
    finally:
        os.close(handle)


@contextmanager
def appending(path: Path) -> Iterator[BinaryIO]:
    """Open a file for more rows, and flush them to disk.

    Raises:
        UserError: the disk is full or the folder cannot be written.
    """
    try:
        with path.open("ab") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
    except OSError as error:
        raise UserError(f"cannot write {path}: {error.strerror}; free the disk or choose another folder") from error


@contextmanager
def others_writing(folder: Path) -> Iterator[None]:
    """Let what others write into ``folder``, such as a logger, end in one line where the disk takes no more.

    Raises:
        UserError: the disk is full or read-only, or a quota or a limit on the size of files is reached.
    """
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        cause: BaseException | None = error
        while cause is not None and not (isinstance(cause, OSError) and cause.errno in _NO_ROOM):
            cause = cause.__cause__  # TensorBoard's logger wraps what goes wrong
        if cause is None:
            raise
        raise UserError(
            f"cannot write into {folder}: {cause.strerror}; free the disk or choose another folder"
        ) from error
