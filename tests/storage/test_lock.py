# SPDX-License-Identifier: Apache-2.0
"""Locks of run directories."""

import errno
import fcntl
import os
from pathlib import Path

import pytest

from omniq.errors import UserError
from omniq.storage.lock import lock


@pytest.mark.parametrize("code", ["ENOSYS", "ENOLCK", "EOPNOTSUPP"])
def test_lock_on_filesystem_without_locks_warns(
    code: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def flock(handle: int, operation: int) -> None:
        raise OSError(getattr(errno, code), "nothing like that here")

    monkeypatch.setattr(fcntl, "flock", flock)
    os.close(lock(tmp_path / "lock"))
    assert "this filesystem has no file locks (nothing like that here)" in caplog.text


def test_lock_held_by_another_process_is_refused(tmp_path: Path) -> None:
    handle = lock(tmp_path / "lock")
    with pytest.raises(UserError, match="is in use by another omniq process"):
        lock(tmp_path / "lock")
    os.close(handle)


def test_lock_refused_for_another_reason_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def flock(handle: int, operation: int) -> None:
        raise OSError(errno.EIO, "input/output error")

    monkeypatch.setattr(fcntl, "flock", flock)
    with pytest.raises(UserError, match="cannot be locked: input/output error; choose another folder"):
        lock(tmp_path / "lock")
