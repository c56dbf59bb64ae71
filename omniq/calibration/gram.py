# SPDX-License-Identifier: Apache-2.0
"""Base of the layer-wise stages: gather the Gram matrix of each input, then choose codes without gradients.

GPTQ, QuantEase, SpQR and AWQ all minimise, for every linear,

    f(W^) = ||W X - W^ X||^2 = tr((W - W^) S (W - W^)^T),   S = X X^T

S is the only statistic of the calibration data that they need. Steps for each group of linears that share an input:

1. Run the block on the quantized stream and gather S. With ``true_sequential`` (the default), a later group sees the
   earlier groups of its own block already quantized.
2. Stack the linears that have the same grid by rows (``omniq.calibration.stacked_linears``). This is exact, because the
   objective treats each row independently.
3. Run the steps of the solver (sweeps) on each stack.

Lightning drives the stage as one epoch whose steps are the gathering batches and the solver steps of every group. A
checkpoint after a pass, at most one every five seconds, makes the stage resumable.

If no token reaches a linear, such as an expert of a mixture, that linear has no S. It is rounded to nearest, or keeps
the result of the previous stage if this stage builds on it. The same applies to an expert that sees fewer tokens than
its inputs, because S then describes these tokens rather than the inputs. The summary of the block names the linears.
All experts of a layer gather in the same pass.

S accumulates in float32. Half-precision inputs are multiplied without conversion and summed in float32, because
products of two float16 values are exact in float32. With several processes, S is summed over all of them. Only the
forward of the block follows the precision of the Trainer; solvers compute in float32 unless their settings say
otherwise.

Shapes: ``n`` samples, ``t`` tokens, ``o`` output features of a stacked group, ``i`` input features, ``G`` groups.
"""

import logging
from abc import abstractmethod
from collections.abc import Mapping
from itertools import groupby
from typing import Any

import torch
from torch import Tensor

from omniq.calibration.input_statistics import InputGram, relative_error, without_autocast
from omniq.calibration.loader import PlanLoader
from omniq.calibration.module import BlockModule
from omniq.calibration.observe import Observation
from omniq.calibration.rounding import round_to_nearest
from omniq.calibration.second_moments import note_starved, note_unreached, unknown_moment
from omniq.calibration.settings import GramStage
from omniq.calibration.stacked_linears import StackedLinears, split_by_grid
from omniq.calibration.task import BlockTask
from omniq.distributed import collectives
from omniq.kernels.matmul_precision import matmul_precision
from omniq.models.propose import pattern
from omniq.storage.block_result import BlockResult, QuantizedLinear

log = logging.getLogger("omniq")


class GramModule(BlockModule):
    """A block whose linears are solved group by group.

    Args:
        task: the block, its streams and its grids.
        settings: the settings of the stage.
        work: number of solver steps for each group.
    """

    save_interval = 5.0  # seconds: a sweep takes milliseconds on a GPU, but saving its Gram matrix takes much longer

    def __init__(self, task: BlockTask, settings: GramStage, work: int = 1) -> None:
        super().__init__(task)
        self.automatic_optimization = False
        self.settings, self.work = settings, work
        groups = tuple(range(len(task.layout.groups)))
        alike = [tuple(same) for _, same in groupby(groups, lambda k: pattern(task.layout.groups[k][0]))]
        self.rounds = tuple(alike) if settings.true_sequential else (groups,)
        self.plan = [(k, names) for k in groups for names in split_by_grid(task.layout.groups[k], task.grids)]
        self.observation: Observation | None = None  # while a round gathers
        self.grams: dict[int, Tensor] = {}  # by group
        self.tokens: dict[int, int] = {}  # number of tokens that S sums over, in all processes; 0 without S; by group
        self.too_few: dict[int, int] = {}  # number of tokens of an expert that has no S, by group
        self.found: dict[str, QuantizedLinear] = {}
        self.stacks: dict[int, StackedLinears] = {}  # by position in ``plan``
        self._solved_weights: dict[str, Tensor] = {}

    def loader(self) -> PlanLoader:
        return PlanLoader(len(self.task.inputs), self.settings.batch_size, len(self.rounds), self.work)

    def configure_optimizers(self) -> None:
        """Give Lightning no optimizer: a solver is created only when its Gram matrix is complete."""

    @abstractmethod
    def solve(self, number: int, stack: StackedLinears, gram: Tensor, step: int) -> dict[str, QuantizedLinear] | None:
        """Run one step of the solver on one stack.

        Args:
            number: position of the stack in ``plan``, whose entries are (group, names of the linears).
            stack: the linears of the stack.
            gram: Gram matrix of their input, float32 ``[i, i]``, on the device of the block.
            step: number of the step, from 0.

        Returns:
            the finished linears after the last step; None before.
        """

    @torch.no_grad()
    def training_step(self, indices: Tensor, batch_idx: int) -> None:
        round_number, step = divmod(batch_idx, self.batches.steps_per_pass)
        groups = self.rounds[round_number]
        if len(indices):
            self._gather(groups, indices)
            if step + 1 == self.batches.steps_per_pass - self.work:
                self._finish_gathering(groups)
            return
        work = step - (self.batches.steps_per_pass - self.work)
        for k in (k for k in groups if self.tokens[k]):
            for number in self.stacks_in(k):
                with without_autocast(self.grams[k]), matmul_precision("float32", self.task.device):
                    done = self.solve(number, self._stack(number), self.grams[k], work)
                if done is not None:
                    self._keep(number, done)
            if self.found.keys() >= set(self.task.layout.groups[k]):
                del self.grams[k]

    def finish(self) -> BlockResult:
        groups = self.task.layout.groups
        note_unreached(self.task, [name for k, tokens in self.too_few.items() if not tokens for name in groups[k]])
        note_starved(self.task, {groups[k][0]: tokens for k, tokens in self.too_few.items() if tokens})
        return BlockResult({name: self.found[name] for name in self.task.layout.linears}, self.task.plain_tensors())

    def second_moment(self, number: int) -> Tensor:
        """The mean squares ``[i]`` or mean products ``[i, i]`` of a stack's input, as the clipping needs."""
        k = self.plan[number][0]
        return (self.grams[k] if self.settings.clipping.needs_gram else self.grams[k].diagonal()) / self.tokens[k]

    def track_errors(self, stack: StackedLinears, rows: slice, errors: Tensor, powers: Tensor) -> None:
        """Track the relative reconstruction error of each linear, without waiting for the device.

        Args:
            stack: the linears.
            rows: rows of the stack that this process has solved: its share, or all of them.
            errors, powers: ``d S d^T`` and ``w S w^T`` of each of these rows.
        """
        parts = torch.stack([errors, powers]).split(stack.lengths(rows), 1)
        sums = collectives.all_reduce_sum(torch.stack([part.sum(1) for part in parts]))
        for name, (error, power) in zip(stack.names, sums, strict=True):
            self.track(f"{name.rpartition('.')[2]}/recon_error", relative_error(error, power))

    def _gather(self, groups: tuple[int, ...], indices: Tensor) -> None:
        if self.observation is None:
            names = [self.task.layout.groups[k][0] for k in groups]
            self.observation = Observation(self.task, [InputGram()], names, self.settings.token_weights)
        self.observation.run_batch(indices, self._solved_weights)

    def _finish_gathering(self, groups: tuple[int, ...]) -> None:
        """Sum the statistics over processes, reject non-finite values, and finish linears that no token reaches."""
        assert self.observation is not None
        for number in (number for k in groups for number in self.stacks_in(k)):
            self._stack(number)  # checks the weights first: non-finite weights also make later inputs non-finite
        seen, self.observation = self.observation.results(), None
        for k in groups:
            name = self.task.layout.groups[k][0]
            width = self.task.linear(name).in_features
            self.tokens[k] = seen[name].tokens
            if not self.tokens[k] or (self.tokens[k] < width and pattern(name) != name):
                self.too_few[k], self.tokens[k] = self.tokens[k], 0
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
        """The results for a group of linears that no token or too few tokens reach."""
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
        """Positions in ``plan`` of the stacks of a group; they share the Gram matrix of the group."""
        return [number for number, (group, _) in enumerate(self.plan) if group == k]

    def _keep(self, number: int, done: dict[str, QuantizedLinear]) -> None:
        self.found |= done
        self._add_solved_weights(done)
        del self.stacks[number]

    def _add_solved_weights(self, done: dict[str, QuantizedLinear]) -> None:
        for name, linear in done.items():
            weight = self.task.linear(name).weight
            self._solved_weights[f"{name}.weight"] = linear.dequantize(weight.dtype, weight.device)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        solvers = self.solver_state()
        solved = {self.plan[number][0] for number in solvers}
        checkpoint["gram stage"] = {
            "groups": [list(group) for group in self.task.layout.groups],
            "grams": {k: gram for k, gram in self.grams.items() if k not in solved},
            "tokens": self.tokens,
            "too few": self.too_few,
            "found": {name: linear.to_state() for name, linear in self.found.items()},
            "solvers": solvers,
        }

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        state = checkpoint["gram stage"]
        device = self.task.device
        self.grams = {k: gram.to(device) for k, gram in state["grams"].items()}
        every = self.task.inputs.shape[0] * self.task.inputs.shape[1] * collectives.world_size()
        # Checkpoints up to version 1b67ee7 hold no counts; in those versions every linear saw every token.
        self.tokens = dict(state.get("tokens", dict.fromkeys(range(len(self.task.layout.groups)), every)))
        self.too_few = dict(state.get("too few", {k: 0 for k, number in self.tokens.items() if not number}))
        self.found = {name: QuantizedLinear.from_state(linear) for name, linear in state["found"].items()}
        self._add_solved_weights(self.found)
        self.load_solver_state(state["solvers"])

    def can_resume(self, checkpoint: Mapping[str, Any]) -> bool:
        """True if the groups have not changed, because Gram matrices are saved by the position of their group."""
        groups = checkpoint["gram stage"].get("groups")  # not saved up to version 1b67ee7
        return groups is None or groups == [list(group) for group in self.task.layout.groups]

    def solver_state(self) -> dict[int, Any]:
        """State of the unfinished solvers, including their Gram matrices, by the position of their stack."""
        return {}

    def load_solver_state(self, state: dict[int, Any]) -> None:
        """Restore the state that ``solver_state`` returned."""
