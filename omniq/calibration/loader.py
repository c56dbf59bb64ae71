# SPDX-License-Identifier: Apache-2.0
"""The batches of one stage: several passes over the samples as one stateful sequence."""

from collections.abc import Iterator, Mapping

import torch
from torch import Tensor


class PassLoader:
    """A sized, stateful loader: several passes over the samples as one sequence of batches.

    Yields int64 sample indices, ``[batch]``. Lightning saves and restores its position. The order of a pass is a
    permutation drawn from (seed, pass), or the natural one.

    Args:
        samples: number of samples; a last, smaller batch is kept.
        batch_size: samples a step.
        passes: passes over the samples.
        seed: of the permutation; None for the natural order (the paper's).
    """

    def __init__(self, samples: int, batch_size: int = 1, passes: int = 1, seed: int | None = None) -> None:
        self.samples, self.batch_size, self.passes, self.seed = samples, batch_size, passes, seed
        self.position = 0

    @property
    def steps_per_pass(self) -> int:
        """Batches of one pass."""
        return -(-self.samples // self.batch_size)

    def __len__(self) -> int:
        return self.passes * self.steps_per_pass

    def __iter__(self) -> Iterator[Tensor]:
        while self.position < len(self):
            turn, step = divmod(self.position, self.steps_per_pass)
            # NOTE: advance before the yield; code after the last yield of a sized loader never runs.
            self.position += 1
            yield self._order(turn)[step * self.batch_size : (step + 1) * self.batch_size]

    def _order(self, turn: int) -> Tensor:
        if self.seed is None:
            return torch.arange(self.samples)
        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + turn)
        return torch.randperm(self.samples, generator=generator)

    def pass_of(self, step: int) -> int:
        """Number of the pass, from 0, that step number ``step`` (from 1) belongs to."""
        return (step - 1) // self.steps_per_pass

    def ends_pass(self, step: int) -> bool:
        """Whether step number ``step`` (from 1) is the last of its pass: a moment to save."""
        return step % self.steps_per_pass == 0

    def state_dict(self) -> dict[str, int]:
        return {"position": self.position}

    def load_state_dict(self, state: Mapping[str, int]) -> None:
        self.position = state["position"]
