# SPDX-License-Identifier: Apache-2.0
"""Loaders: the passes of one stage over the samples, as one stateful sequence of batches."""

from collections.abc import Iterator, Mapping

import torch
from torch import Tensor

from omniq.distributed import collectives


class PassLoader:
    """A sized, stateful loader: several passes over the samples as one sequence of batches.

    Yields int64 sample indices, ``[batch]``. Lightning saves and restores the position. The order of a pass is a
    permutation drawn from (seed, pass), or the natural order.

    Args:
        samples: number of samples; the last batch of a pass may be smaller.
        batch_size: samples per step.
        passes: number of passes over the samples.
        seed: seed of the permutation; None for the natural order (as in the paper).
    """

    def __init__(self, samples: int, batch_size: int = 1, passes: int = 1, seed: int | None = None) -> None:
        self.samples, self.batch_size, self.passes, self.seed = samples, batch_size, passes, seed
        self.position = 0

    @property
    def steps_per_pass(self) -> int:
        """Number of batches in one pass."""
        return -(-self.samples // self.batch_size)

    def __len__(self) -> int:
        return self.passes * self.steps_per_pass

    def __iter__(self) -> Iterator[Tensor]:
        while self.position < len(self):
            number, step = divmod(self.position, self.steps_per_pass)
            # NOTE: advance before the yield; code after the last yield of a sized loader never runs.
            self.position += 1
            yield self._order(number)[step * self.batch_size : (step + 1) * self.batch_size]

    def _order(self, number: int) -> Tensor:
        if self.seed is None:
            return torch.arange(self.samples)
        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + number)
        return torch.randperm(self.samples, generator=generator)

    def pass_of(self, step: int) -> int:
        """Number of the pass (from 0) to which step ``step`` (from 1) belongs."""
        return (step - 1) // self.steps_per_pass

    def ends_pass(self, step: int) -> bool:
        """True if step ``step`` (from 1) is the last of its pass, after which a checkpoint may be saved."""
        return step % self.steps_per_pass == 0

    def state_dict(self) -> dict[str, int]:
        return {"position": self.position}

    def load_state_dict(self, state: Mapping[str, int]) -> None:
        self.position = state["position"]


class PlanLoader(PassLoader):
    """For each round: the gathering batches, as sample indices, then the solver steps, as empty tensors.

    Args:
        samples: number of samples to gather.
        batch_size: samples per gathering step.
        rounds: number of rounds, each of which gathers all samples once.
        work: solver steps per round.
    """

    def __init__(self, samples: int, batch_size: int, rounds: int, work: int) -> None:
        super().__init__(samples, batch_size, rounds)
        self.gathering, self.work = super().steps_per_pass, work

    @property
    def steps_per_pass(self) -> int:
        """Number of gathering and solver steps in one round."""
        return self.gathering + self.work

    def pass_of(self, step: int) -> int:
        """Number of the pass: the gathering of a round is one pass, and so is each step of the solver."""
        number, inside = divmod(step - 1, self.steps_per_pass)
        return number * (1 + self.work) + max(0, inside - self.gathering + 1)

    def ends_pass(self, step: int) -> bool:
        """True after the gathering and after each solver step.

        With several processes, True only after the gathering and after the last step of a round: in between, each
        process has the state of its own rows, which no checkpoint holds.
        """
        inside = step % self.steps_per_pass
        if collectives.world_size() > 1:
            return inside in (0, self.gathering)
        return inside == 0 or inside >= self.gathering

    def __iter__(self) -> Iterator[Tensor]:
        while self.position < len(self):
            step = self.position % self.steps_per_pass
            self.position += 1
            start = step * self.batch_size if step < self.gathering else self.samples
            yield torch.arange(self.samples)[start : start + self.batch_size]
