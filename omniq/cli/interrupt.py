# SPDX-License-Identifier: Apache-2.0
"""Ctrl-C: the first one ends a command in order, the second one ends the process at once.

After the first KeyboardInterrupt, Lightning ignores SIGINT and waits for its own shutdown. A process that hangs there,
or in a native call such as a collective, never handles another Ctrl-C. The first SIGINT therefore raises
``Interrupted``, which Lightning re-raises, and a thread counts the signals. At the second signal, the thread writes the
stack of every thread to stderr and ends the process, even if the main thread is blocked.

The thread receives signals through the wakeup descriptor of the ``signal`` module. Python writes to it in the signal
handler itself, so the main thread does not have to run.
"""

import faulthandler
import os
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

# ``torchrun`` and ``srun`` forward a Ctrl-C that the terminal has already sent to the whole process group.
_SAME_INTERRUPT = 1.0  # seconds


class Interrupted(BaseException):
    """The first SIGINT. It is not a KeyboardInterrupt, because Lightning handles those itself."""


@contextmanager
def interruptible() -> Iterator[None]:
    """Raise ``Interrupted`` at the first SIGINT, and end the process with status 130 at a later one.

    After an interrupt, the handler stays active until the process ends, because a thread may still hang. This context
    has no effect outside the main thread, or if the caller handles or ignores SIGINT itself.
    """
    own = signal.getsignal(signal.SIGINT) is signal.default_int_handler
    if not own or threading.current_thread() is not threading.main_thread():
        yield
        return
    read, write = os.pipe()
    os.set_blocking(write, False)
    earlier, owner, interrupted = signal.set_wakeup_fd(write, warn_on_full_buffer=False), os.getpid(), False

    def on_interrupt(number: int, frame: FrameType | None) -> None:
        nonlocal interrupted
        if os.getpid() != owner:  # a forked process, such as a worker of a DataLoader
            raise KeyboardInterrupt
        if not interrupted:
            interrupted = True
            raise Interrupted

    signal.signal(signal.SIGINT, on_interrupt)
    threading.Thread(target=_end_at_second, args=(read,), name="interrupts", daemon=True).start()
    _watched.append(write)
    try:
        yield
    finally:
        if not interrupted:
            _watched.remove(write)
            signal.signal(signal.SIGINT, signal.default_int_handler)
            signal.set_wakeup_fd(earlier)
            os.close(write)  # the thread ends


_watched: list[int] = []  # the active wakeup descriptor, if any


def _leave_to_parent() -> None:
    """Stop a forked process from sending its signals to the thread of the parent."""
    if _watched:
        signal.set_wakeup_fd(-1)


os.register_at_fork(after_in_child=_leave_to_parent)


def _end_at_second(read: int) -> None:
    """Read signal numbers until the other end of the pipe is closed. End the process at the second SIGINT."""
    first: float | None = None
    while number := os.read(read, 1):
        if number[0] != signal.SIGINT:
            continue
        if first is None:
            first = time.monotonic()
        elif time.monotonic() - first > _SAME_INTERRUPT:
            os.write(2, b"omniq: interrupted again: ends at once; this is where every thread was\n")
            faulthandler.dump_traceback(file=2, all_threads=True)
            os._exit(130)
    os.close(read)
