# SPDX-License-Identifier: Apache-2.0
"""Atomic files: each file is written under a temporary name, flushed and renamed."""

import errno
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import BinaryIO

from omniq.errors import UserError

_NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS)


def expand_home(path: str | Path) -> Path:
    """Replace a leading ``~`` by the home folder. The shell does not expand every ``~``.

    Raises:
        UserError: the path names a user without a home folder on this machine, or no file can have it.
    """
    try:
        place = Path(path).expanduser()
    except RuntimeError as error:
        raise UserError(f"{path}: this user has no home folder; give the path without ~") from error
    check_possible(place)
    return place


def check_possible(path: Path) -> None:
    """Refuse a path that no file can have, whether or not one exists there.

    Raises:
        UserError: a name in it or the whole path is too long for the filesystem, or it holds characters
            that no name can have here.
    """
    try:
        path.lstat()
    except UnicodeEncodeError as error:
        raise UserError(
            f"{path} cannot be a file name in the encoding {error.encoding} of this environment: set PYTHONUTF8=1"
        ) from error
    except ValueError as error:
        raise UserError(f"{str(path)!r} holds a null character: give another path") from error
    except OSError as error:
        if error.errno == errno.ENAMETOOLONG:
            text = str(path)
            raise UserError(
                f"{text if len(text) <= 100 else text[:100] + '…'}: a path of {len(text)} characters, or one of its "
                "names, is too long for this filesystem; choose a shorter one"
            ) from error


def temporary_of(path: Path) -> Path:
    """Where a file is written until it is whole."""
    return path.with_name(f".{path.name}.partial")


def atomic_write(path: Path, *parts: bytes | memoryview) -> None:
    """Write a temporary file, flush it, rename it to ``path``, flush the folder. ``path`` never holds a partial file.

    Raises:
        UserError: the disk is full or the folder cannot be written. The temporary file is removed.
    """
    temporary = temporary_of(path)
    try:
        with temporary.open("wb") as file:
            for part in parts:
                file.write(part)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
        flush(path.parent)
    except OSError as error:
        with suppress(OSError):  # the filesystem may be read-only now
            temporary.unlink()
        raise UserError(f"cannot write {path}: {error.strerror}; free the disk or choose another folder") from error


def flush(path: Path) -> None:
    """Wait until the content of a file, or the entries of a folder, are on the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    except OSError as error:
        unsupported = error.errno in (errno.EINVAL, errno.ENOTSUP)  # some filesystems cannot flush a folder
        if not unsupported or not path.is_dir():
            raise
    finally:
        os.close(handle)


@contextmanager
def open_for_append(path: Path) -> Iterator[BinaryIO]:
    """Open a file to append bytes, and flush it to the disk at the end.

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
def report_full_disk(folder: Path) -> Iterator[None]:
    """Convert the error of a library that writes into ``folder``, such as a logger, if the disk accepts no more data.

    Raises:
        UserError: the disk is full or read-only, or a quota or a limit on the file size is reached.
    """
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        cause: BaseException | None = error
        while cause is not None and not (isinstance(cause, OSError) and cause.errno in _NO_ROOM):
            cause = cause.__cause__  # TensorBoard's logger wraps the error
        if cause is None:
            raise
        raise UserError(
            f"cannot write into {folder}: {cause.strerror}; free the disk or choose another folder"
        ) from error
