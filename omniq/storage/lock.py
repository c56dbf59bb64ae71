# SPDX-License-Identifier: Apache-2.0
"""The lock of a run directory: one process works there at a time."""

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
    """Take the lock file ``path``, which the kernel releases when the process ends.

    Returns:
        the file descriptor; closing it releases the lock. On a filesystem without locks the file is open and a warning
        says that a second process would not be noticed.

    Raises:
        UserError: another process holds the lock, or the filesystem refuses it.
    """
    handle = os.open(path, os.O_RDWR | os.O_CREAT)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno in _UNSUPPORTED:
            log.warning(
                "out %s: this filesystem has no file locks (%s): make sure that no other process of omniq works there",
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
