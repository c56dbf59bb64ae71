# SPDX-License-Identifier: Apache-2.0
"""Write finished blocks and streams in a background thread while the next block trains."""

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from types import TracebackType
from typing import Any


class Writer:
    """Writes one thing after another while the caller goes on; as a context manager it ends with everything written.

    After an error nothing else is written: what comes later may count on what came before. Whoever waits is told.
    """

    def __init__(self) -> None:
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="write")
        self._last: Future[None] | None = None

    def __enter__(self) -> "Writer":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._thread.shutdown()
        if error is None:
            self.wait()

    def start(self, work: Callable[..., None], *args: Any) -> "Future[None]":
        """Do this once everything that was started before is done.

        Returns:
            what tells when it is.
        """
        self._last = self._thread.submit(_after, self._last, work, *args)
        return self._last

    def wait(self) -> None:
        """Return when everything is written."""
        last, self._last = self._last, None
        if last is not None:
            last.result()


def _after(before: "Future[None] | None", work: Callable[..., None], *args: Any) -> None:
    if before is not None:
        before.result()
    work(*args)
