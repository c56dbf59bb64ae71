# SPDX-License-Identifier: Apache-2.0
"""How long a block takes, over all the processes that have worked on it."""

import time


class Stopwatch:
    """Counts from when it is made, on top of what earlier processes counted up to what they saved last."""

    def __init__(self) -> None:
        self._started, self._earlier = time.perf_counter(), 0.0

    @property
    def seconds(self) -> float:
        """Seconds so far."""
        return self._earlier + time.perf_counter() - self._started

    def go_on_from(self, seconds: float) -> None:
        """Take over what an earlier process had counted when it saved what this one continues."""
        self._earlier = seconds
