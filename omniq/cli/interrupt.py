# SPDX-License-Identifier: Apache-2.0
"""Ctrl-C: the first one ends a command in order, the second one ends the process.

Lightning ignores SIGINT from the first KeyboardInterrupt on, and then waits for its own shutdown. A process that hangs
there, or in a native call such as a collective, never sees another Ctrl-C. So the first SIGINT raises ``Interrupted``,
which Lightning passes on, and a thread counts the signals: at the second one it writes the stack of every thread to
stderr and ends the process, whatever the main thread waits for.

The wakeup descriptor of the ``signal`` module tells the thread of a signal. Python writes to it in the signal handler
itself, so the main thread does not have to run.
"""

import faulthandler
import os
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

# ``torchrun`` and ``srun`` pass on a Ctrl-C that the terminal has sent to the whole process group already.
_SAME_INTERRUPT = 1.0  # seconds


class Interrupted(BaseException):
    """The first SIGINT. It is no KeyboardInterrupt, because of what Lightning makes of those."""


@contextmanager
def interruptible() -> Iterator[None]:
    """Raise ``Interrupted`` at the first SIGINT, and end the process with status 130 at a later one.

    After an interrupt this stays in force until the process ends, because a thread may hang even then. Without effect
    outside the main thread, and where the caller handles or ignores SIGINT in its own way.
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


_watched: list[int] = []  # the descriptor that is in use, if any


def _leave_to_parent() -> None:
    """In a forked process: do not tell the parent's thread of signals."""
    if _watched:
        signal.set_wakeup_fd(-1)


os.register_at_fork(after_in_child=_leave_to_parent)


def _end_at_second(read: int) -> None:
    """Read the numbers of signals until the other end of the pipe is closed, or end the process."""
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
