# SPDX-License-Identifier: Apache-2.0
"""The lock of a run directory. It prevents two processes from working in the same directory."""

import errno
import fcntl
import logging
import os
from pathlib import Path

from omniq.errors import UserError

log = logging.getLogger("omniq")

_HELD = (errno.EWOULDBLOCK, errno.EAGAIN, errno.EACCES)
_UNSUPPORTED = (errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOTSUP, errno.EINVAL)


def lock(path: Path) -> int:
    """Lock the file ``path``. The kernel releases the lock when the process ends.

    Returns:
        The file descriptor; closing it releases the lock. On a filesystem without locks, the file is open but not
        locked, and a warning says so.

    Raises:
        UserError: another process holds the lock, or the filesystem refuses it.
    """
    handle = os.open(path, os.O_RDWR | os.O_CREAT)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno in _UNSUPPORTED:
            log.warning(
                "out %s: this filesystem has no file locks (%s): make sure that no other omniq process works there",
                path.parent,
                error.strerror,
            )
            return handle
        os.close(handle)
        if error.errno in _HELD:
            raise UserError(
                f"out {path.parent} is in use by another omniq process: wait for it, or give this run its own folder"
            ) from error
        raise UserError(f"out {path.parent} cannot be locked: {error.strerror}; choose another folder") from error
    return handle
