# SPDX-License-Identifier: Apache-2.0
"""Files are complete or absent, also on a disk that takes no more."""

import errno
import os
from pathlib import Path

import pytest

from omniq.errors import UserError
from omniq.storage.atomic import atomic_write, report_full_disk


@pytest.mark.parametrize("call", ["fsync", "replace"])
def test_atomic_write_on_full_disk_keeps_earlier_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: str
) -> None:
    path = tmp_path / "file"
    atomic_write(path, b"old")

    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, call, full)
    with pytest.raises(UserError, match=f"cannot write {path}: No space left on device; free the disk"):
        atomic_write(path, b"new")
    assert path.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [path]


def test_atomic_write_flushes_folder_after_rename(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Otherwise a power cut could keep a later write, such as a removal, and lose this file."""
    real, seen = os.fsync, []

    def flush(handle: int) -> None:
        real(handle)
        here = os.path.samestat(os.fstat(handle), tmp_path.stat())
        seen.append((here, (tmp_path / "file").exists()))
        if here:
            raise OSError(errno.EINVAL, "Invalid argument")  # a filesystem that cannot flush folders

    monkeypatch.setattr(os, "fsync", flush)
    atomic_write(tmp_path / "file", b"new")
    assert seen == [(False, False), (True, True)]


def test_atomic_write_on_read_only_filesystem_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The partial file cannot be removed either, which must not hide the reason."""

    def refuse(*_: object, **__: object) -> None:
        raise OSError(errno.EROFS, "Read-only file system")

    monkeypatch.setattr(os, "replace", refuse)
    monkeypatch.setattr(Path, "unlink", refuse)
    with pytest.raises(UserError, match=f"cannot write {tmp_path / 'file'}: Read-only file system; free the disk"):
        atomic_write(tmp_path / "file", b"new")


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS])
@pytest.mark.parametrize("wrapped", [False, True])
def test_report_full_disk_on_full_disk_is_refused(tmp_path: Path, number: int, wrapped: bool) -> None:
    error, outer = OSError(number, os.strerror(number)), ValueError("you tried to log 1.0")
    outer.__cause__ = error  # as TensorBoard's logger does
    said = f"cannot write into {tmp_path}: {os.strerror(number)}; free the disk"
    with pytest.raises(UserError, match=said), report_full_disk(tmp_path):
        raise outer if wrapped else error


@pytest.mark.parametrize("error", [OSError(errno.EIO, "Input/output error"), ValueError("no"), UserError("as it was")])
def test_report_full_disk_other_error_is_passed_on(tmp_path: Path, error: Exception) -> None:
    with pytest.raises(type(error), match=str(error.args[-1])) as caught, report_full_disk(tmp_path):
        raise error
    assert caught.value is error


def test_atomic_write_joins_parts_and_replaces_file(tmp_path: Path) -> None:
    path = tmp_path / "file"
    atomic_write(path, b"a much longer content")
    atomic_write(path, b"one", b"", b"two")
    assert path.read_bytes() == b"onetwo"
