# SPDX-License-Identifier: Apache-2.0
"""Layer-wise stages: gather the Gram matrix of each input, then choose codes without gradients.

GPTQ, QuantEase, SpQR and AWQ all minimise, for every linear,

    f(W^) = ||W X - W^ X||^2 = tr((W - W^) S (W - W^)^T),   S = X X^T

and need nothing of the calibration data but S. Linears that share an input share one S. Those of them that are on one
grid are stacked by rows and solved together, which is exact because rows are independent
(``omniq.calibration.stacked_linears``). The inputs are
those of the quantized stream; with ``true_sequential`` (the default) a later group of linears sees the earlier ones of
its own block already quantized.

Driven by Lightning like any stage: one epoch whose steps are, for each group, the batches that gather S and then the
solver's own steps (sweeps). A checkpoint after each of them, at most one every five seconds, makes the stage resumable.

A linear that no token reaches, such as an expert of a mixture, has no S. It is rounded to nearest, or keeps what the
stage before it found if this stage builds on that, and the block's summary names it.

S accumulates in float32. Half-precision inputs are multiplied as they are with float32 sums (products of two float16
are exact in float32); under several processes S is summed over them. Only the block's forward follows the Trainer's
precision; a solver computes in float32, unless its own settings say otherwise.

Shapes: ``n`` samples, ``t`` tokens, ``o`` output features of a stacked group, ``i`` input features, ``G`` groups.
"""

import logging
from abc import abstractmethod
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from omniq.calibration.input_statistics import InputGram, exact, relative
from omniq.calibration.loader import PassLoader
from omniq.calibration.module import BlockModule
from omniq.calibration.observe import Observation
from omniq.calibration.rounding import round_to_nearest
from omniq.calibration.second_moments import note_unreached, unknown_moment
from omniq.calibration.stacked_linears import StackedLinears, split_by_grid
from omniq.calibration.stage import Part, Stage
from omniq.calibration.task import BlockTask
from omniq.calibration.token_weights import TokenWeights
from omniq.distributed import collectives
from omniq.errors import UserError
from omniq.kernels.matmul_precision import matmul_precision
from omniq.quantizers.clipping import RangeEstimator, Searched
from omniq.storage.block_result import BlockResult, QuantizedLinear

log = logging.getLogger("omniq")


class GramStage(Stage):
    """Settings that all layer-wise stages share.

    Args:
        clipping: the range of each group: ``Searched`` (weighted with the diagonal of S) unless another is given.
        true_sequential: gather the inputs of a group of linears after the groups before it were quantized.
        batch_size: samples a gathering step.
        token_weights: how much each token counts in S.
        damping: added to the diagonal of S by the solver, as a share of its mean.

    Raises:
        UserError: nothing is gathered, or the damping is no share.
    """

    def __init__(
        self,
        clipping: RangeEstimator | None = None,
        true_sequential: bool = True,
        batch_size: int = 4,
        token_weights: TokenWeights = "uniform",
        damping: float = 0.01,
    ) -> None:
        name = type(self).__name__
        if batch_size < 1:
            raise UserError(f"batch_size {batch_size} of {name} gathers nothing: give 1 or more")
        if not 0 <= damping < 1:
            raise UserError(
                f"damping {damping} of {name} is outside 0 to 1: it is a share of the mean diagonal, such as 0.01"
            )
        self.clipping = clipping or Searched()
        self.true_sequential, self.batch_size = true_sequential, batch_size
        self.token_weights: TokenWeights = token_weights
        self.damping = damping

    @property
    def leaves(self) -> frozenset[Part]:
        return frozenset({"grid", "codes"})


class PlanLoader(PassLoader):
    """For each round: the batches that gather, as sample indices, then the solver's steps, as empty tensors.

    Args:
        samples, batch_size: of the gathering.
        rounds: how often that happens.
        work: solver steps a round.
    """

    def __init__(self, samples: int, batch_size: int, rounds: int, work: int) -> None:
        super().__init__(samples, batch_size, rounds)
        self.gathering, self.work = super().steps_per_pass, work

    @property
    def steps_per_pass(self) -> int:
        """Gathering and working steps of one round."""
        return self.gathering + self.work

    def pass_of(self, step: int) -> int:
        """The gathering of a round is one pass, and so is each step of the solver."""
        turn, inside = divmod(step - 1, self.steps_per_pass)
        return turn * (1 + self.work) + max(0, inside - self.gathering + 1)

    def ends_pass(self, step: int) -> bool:
        """After the gathering, and after each step of the solver; of several processes, after the last one of a round.

        In between each of them has rows of its own, which no checkpoint holds.
        """
        inside = step % self.steps_per_pass
        return (
            inside in (0, self.gathering) if collectives.world_size() > 1 else inside == 0 or inside >= self.gathering
        )

    def __iter__(self) -> Iterator[Tensor]:
        while self.position < len(self):
            step = self.position % self.steps_per_pass
            self.position += 1
            start = step * self.batch_size if step < self.gathering else self.samples
            yield torch.arange(self.samples)[start : start + self.batch_size]


class GramModule(BlockModule):
    """A block whose linears are solved group by group.

    Args:
        task: the block, its streams and its grids.
        settings: of the stage.
        work: solver steps for each group.
    """

    save_interval = 5.0  # seconds: a sweep takes milliseconds on a GPU, a checkpoint with its Gram matrix does not

    def __init__(self, task: BlockTask, settings: GramStage, work: int = 1) -> None:
        super().__init__(task)
        self.automatic_optimization = False
        self.settings, self.work = settings, work
        groups = tuple(range(len(task.layout.groups)))
        self.rounds = tuple((k,) for k in groups) if settings.true_sequential else (groups,)
        self.plan = [(k, names) for k in groups for names in split_by_grid(task.layout.groups[k], task.grids)]
        self.observation: Observation | None = None  # of the round that gathers
        self.grams: dict[int, Tensor] = {}  # by group
        self.tokens: dict[int, int] = {}  # that S is a sum over, of all processes; by group
        self.found: dict[str, QuantizedLinear] = {}
        self.stacks: dict[int, StackedLinears] = {}  # by position in ``plan``
        self._deployed: dict[str, Tensor] = {}

    def loader(self) -> PlanLoader:
        return PlanLoader(len(self.task.inputs), self.settings.batch_size, len(self.rounds), self.work)

    def configure_optimizers(self) -> None:
        """None for Lightning: a solver exists only once its Gram matrix does."""

    @abstractmethod
    def solve(self, number: int, stack: StackedLinears, gram: Tensor, step: int) -> dict[str, QuantizedLinear] | None:
        """One step of the solver on one stack.

        Args:
            number: position of the stack in ``plan``, which lists each stack after its group.
            stack: its linears.
            gram: ``[i, i]``, float32, on the device of the block.
            step: from 0.

        Returns:
            the finished linears after the last step, None before.
        """

    @torch.no_grad()
    def training_step(self, indices: Tensor, batch_idx: int) -> None:
        turn, step = divmod(batch_idx, self.batches.steps_per_pass)
        groups = self.rounds[turn]
        if len(indices):
            self._gather(groups, indices)
            if step + 1 == self.batches.steps_per_pass - self.work:
                self._gathered(groups)
            return
        work = step - (self.batches.steps_per_pass - self.work)
        for k in (k for k in groups if self.tokens[k]):
            for number in self.stacks_in(k):
                with exact(self.grams[k]), matmul_precision("float32", self.task.device):
                    done = self.solve(number, self._stack(number), self.grams[k], work)
                if done is not None:
                    self._keep(number, done)
            if self.found.keys() >= set(self.task.layout.groups[k]):
                del self.grams[k]

    def finish(self) -> BlockResult:
        groups = self.task.layout.groups
        note_unreached(self.task, [name for k, tokens in self.tokens.items() if not tokens for name in groups[k]])
        return BlockResult({name: self.found[name] for name in self.task.layout.linears}, self.task.plain_tensors())

    def second_moment(self, number: int) -> Tensor:
        """What the clipping needs to know of a stack's input: mean squares ``[i]`` or mean products ``[i, i]``."""
        k = self.plan[number][0]
        return (self.grams[k] if self.settings.clipping.needs_gram else self.grams[k].diagonal()) / self.tokens[k]

    def track_errors(self, stack: StackedLinears, rows: slice, errors: Tensor, powers: Tensor) -> None:
        """Track the relative reconstruction error of each linear, without waiting for the device.

        Args:
            rows: of the stack, that this process has solved: its share, or all of them.
            errors, powers: ``d S d^T`` and ``w S w^T`` of each of these rows.
        """
        parts = torch.stack([errors, powers]).split(stack.lengths(rows), 1)
        sums = collectives.all_reduce_sum(torch.stack([part.sum(1) for part in parts]))
        for name, (error, power) in zip(stack.names, sums, strict=True):
            self.track(f"{name.rpartition('.')[2]}/recon_error", relative(error, power))

    def _gather(self, groups: tuple[int, ...], indices: Tensor) -> None:
        if self.observation is None:
            names = [self.task.layout.groups[k][0] for k in groups]
            self.observation = Observation(self.task, [InputGram()], names, self.settings.token_weights)
        self.observation.run_batch(indices, self._deployed)

    def _gathered(self, groups: tuple[int, ...]) -> None:
        """Sum over processes, refuse what no solver can use, and finish what no token reaches."""
        assert self.observation is not None
        for number in (number for k in groups for number in self.stacks_in(k)):
            self._stack(number)  # weights that are not finite are to blame for the inputs behind them: named first
        seen, self.observation = self.observation.results(), None
        for k in groups:
            name = self.task.layout.groups[k][0]
            width = self.task.linear(name).in_features
            self.tokens[k] = seen[name].tokens
            if not self.tokens[k]:
                done = self._unreached(k)
                for number in self.stacks_in(k):
                    self._keep(number, {name: done[name] for name in self.plan[number][1]})
                continue
            (self.grams[k],) = seen[name].totals
            if self.tokens[k] < width and collectives.rank() == 0:
                log.warning(
                    "%s %s: %d tokens for %d inputs; give at least as many tokens as inputs "
                    "(data.samples, data.length)", self.task.name, name, self.tokens[k], width,
                )  # fmt: skip

    def _unreached(self, k: int) -> dict[str, QuantizedLinear]:
        """The linears of a group that no token reaches."""
        task, clipping, names = self.task, self.settings.clipping, self.task.layout.groups[k]
        if task.result is not None and "grid" in self.settings.takes:
            return {name: task.result.linears[name] for name in names}
        weights = {name: task.linear(name).weight for name in names}
        moment = unknown_moment(task.linear(names[0]), clipping.needs_gram)
        return {name: round_to_nearest(weight, task.grids[name], clipping, moment) for name, weight in weights.items()}

    def _stack(self, number: int) -> StackedLinears:
        if number not in self.stacks:
            self.stacks[number] = StackedLinears.of(self.task, self.plan[number][1])
        return self.stacks[number]

    def stacks_in(self, k: int) -> list[int]:
        """Positions of the stacks of a group, which share its Gram matrix."""
        return [number for number, (group, _) in enumerate(self.plan) if group == k]

    def _keep(self, number: int, done: dict[str, QuantizedLinear]) -> None:
        self.found |= done
        self._deploy(done)
        del self.stacks[number]

    def _deploy(self, done: dict[str, QuantizedLinear]) -> None:
        for name, linear in done.items():
            weight = self.task.linear(name).weight
            self._deployed[f"{name}.weight"] = linear.dequantize(weight.dtype, weight.device)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        solvers = self.solver_state()
        solved = {self.plan[number][0] for number in solvers}
        checkpoint["gram stage"] = {
            "groups": [list(group) for group in self.task.layout.groups],
            "grams": {k: gram for k, gram in self.grams.items() if k not in solved},
            "tokens": self.tokens,
            "found": {name: linear.to_state() for name, linear in self.found.items()},
            "solvers": solvers,
        }

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        state = checkpoint["gram stage"]
        device = self.task.device
        self.grams = {k: gram.to(device) for k, gram in state["grams"].items()}
        every = self.task.inputs.shape[0] * self.task.inputs.shape[1] * collectives.world_size()
        # Up to version 1b67ee7 no counts were saved, and every linear saw every token.
        self.tokens = dict(state.get("tokens", dict.fromkeys(range(len(self.task.layout.groups)), every)))
        self.found = {name: QuantizedLinear.from_state(linear) for name, linear in state["found"].items()}
        self._deploy(self.found)
        self.load_solver_state(state["solvers"])

    def can_resume(self, checkpoint: Mapping[str, Any]) -> bool:
        """Gram matrices are saved by the position of their group: whether the groups are still the same."""
        groups = checkpoint["gram stage"].get("groups")  # not saved up to version 1b67ee7
        return groups is None or groups == [list(group) for group in self.task.layout.groups]

    def solver_state(self) -> dict[int, Any]:
        """State of the solvers in mid-solution, Gram matrix included, by position of their stack."""
        return {}

    def load_solver_state(self, state: dict[int, Any]) -> None:
        """Take up what ``solver_state`` gave."""
