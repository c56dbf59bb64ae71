# SPDX-License-Identifier: Apache-2.0
"""The time that a block takes, over all processes that worked on it one after another."""

import time


class Stopwatch:
    """Measures the time since its construction, and adds the time that earlier processes had saved."""

    def __init__(self) -> None:
        self._started, self._earlier = time.perf_counter(), 0.0

    @property
    def seconds(self) -> float:
        """The elapsed time in seconds."""
        return self._earlier + time.perf_counter() - self._started

    def continue_from(self, seconds: float) -> None:
        """Add the seconds that an earlier process had measured at the checkpoint that this process continues."""
        self._earlier = seconds
