# SPDX-License-Identifier: Apache-2.0
"""A tiny run of two blocks and two stages that was never interrupted, for tests of resume."""

from pathlib import Path
from typing import Any, NamedTuple

from tests.helpers.killing import Attempt, Attempts
from tests.helpers.runs import omniquant, outcome

STAGES = [omniquant(transform={"shift": False}), omniquant(schedule="cosine", shuffle=True, augmented_loss=True)]


class Reference(NamedTuple):
    """An uninterrupted run, and what makes more of them."""

    folder: Path
    args: list[str]
    attempts: Attempts
    first: Attempt
    outcome: dict[str, Any]

    def finish(self, out: Path, extra: tuple[str, ...] = ()) -> Attempt:
        """Start the run again, for the last time, and compare what it leaves."""
        last = self.attempts.run([*self.args, *extra], out)
        assert last.status == 0, last.output
        assert outcome(out) == self.outcome
        assert not list(out.rglob("*partial*"))
        return last
