# SPDX-License-Identifier: Apache-2.0
"""Write finished blocks and streams in a background thread while the next block trains."""

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from types import TracebackType
from typing import Any


class Writer:
    """Runs writes in order in a background thread. As a context manager, it waits for all writes on exit.

    After an error, later writes are skipped, because they may depend on the failed one. ``wait`` raises the error.
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
        """Call ``work`` in the background, after all earlier writes.

        Returns:
            A future of this write.
        """
        self._last = self._thread.submit(_after, self._last, work, *args)
        return self._last

    def wait(self) -> None:
        """Wait until all writes are done, and raise the first error."""
        last, self._last = self._last, None
        if last is not None:
            last.result()


def _after(before: "Future[None] | None", work: Callable[..., None], *args: Any) -> None:
    if before is not None:
        before.result()
    work(*args)
