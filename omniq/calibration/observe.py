# SPDX-License-Identifier: Apache-2.0
"""Gather statistics of the inputs of a block's linears, by running the block on the quantized stream.

``observe`` is the one way to gather them; a stage that gathers over several training steps uses the ``Observation``
inside. Linears that share an input share its statistics, so one linear of each group is observed. Everything
accumulates on the device, without host synchronisation (``omniq.calibration.input_statistics``).

An expert of a mixture sees any number of tokens, zero included. The rows of its input then do not belong to samples:
they are added up as if they were one sample, and relative token weights, which need the token of each row, are refused.
A linear that no token of any process reaches has ``Observed.tokens == 0``, in all processes alike.

Shapes: ``i`` input features.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from omniq.blocks.placement import gather_samples
from omniq.calibration.input_statistics import Statistic
from omniq.calibration.task import BlockTask
from omniq.calibration.token_weights import TokenWeights, relative_weights
from omniq.distributed import collectives
from omniq.kernels.layer_problem import all_finite

_BATCH = 4  # samples at once


@dataclass(frozen=True)
class Observed:
    """What was observed of one input, over all processes.

    Args:
        tokens: how many tokens were observed.
        totals: the statistics, in the order asked for; empty if there was no token.
    """

    tokens: int
    totals: tuple[Tensor, ...]


@dataclass
class _Counts:
    """What one process has observed of one input so far.

    Args:
        tokens: rows that were added up.
        unweighted: rows that were not, because their weights are unknown.
        bad: how many samples and how many rows are not finite, int64 ``[2]`` on the device. Samples are counted only
            where the rows belong to them.
        totals: the statistics.
        in_order: whether the linear has been called before every later group, as the layout says.
    """

    tokens: int = 0
    unweighted: int = 0
    bad: Tensor | None = None
    totals: list[Tensor] = field(default_factory=list)
    in_order: bool = False


class Observation:
    """Statistics of the inputs of some linears, gathered over any number of forwards.

    Args:
        task: the block and its streams.
        statistics: to gather.
        names: of the linears; the first of each group if not given.
        token_weights: how much each token counts in a sum.
        quantized: whether the block computes on quantized activations, as the deployed one does.
    """

    def __init__(
        self,
        task: BlockTask,
        statistics: Sequence[Statistic],
        names: Sequence[str] | None = None,
        token_weights: TokenWeights = "uniform",
        quantized: bool = True,
    ) -> None:
        self.task, self.statistics, self.token_weights, self.quantized = task, statistics, token_weights, quantized
        groups = task.layout.groups
        self.counts = {name: _Counts() for name in (names or [group[0] for group in groups])}
        last = max(k for k, group in enumerate(groups) if self.counts.keys() & set(group))
        self._later = [group[0] for group in groups[last + 1 :]]
        self._weights: Tensor | None = None
        self._samples = 0

    @torch.no_grad()
    def run_batch(self, samples: slice | Tensor, tensors: Mapping[str, Tensor] | None = None) -> None:
        """Run the block on some samples, no further than the wanted inputs need.

        The batch ends when every wanted linear was called. A linear that was called before every later group in an
        earlier batch need not be waited for once a later group is called: no token of this batch reaches it.

        Args:
            samples: their indices or their place in the stream.
            tensors: parameters that replace those of the block.
        """
        task, waiting, passed = self.task, set(self.counts), False
        inputs = gather_samples(task.inputs, samples, task.device)
        self._samples, self._weights = len(inputs), None
        if self.token_weights == "relative":
            self._weights = relative_weights(gather_samples(task.targets, samples, task.device))

        def observe_input(name: str, x: Tensor) -> None:
            nonlocal passed
            if name in self.counts:
                self._add(name, x)
                self.counts[name].in_order |= not passed
                waiting.discard(name)
            else:
                passed = True
            if not waiting or (passed and all(self.counts[each].in_order for each in waiting)):
                raise _Enough

        activations = task.quantized_activations() if self.quantized else nullcontext()
        with activations, observed(task.block, (*self.counts, *self._later), observe_input), suppress(_Enough):
            functional_call(task.block, dict(tensors or {}), (inputs,), dict(task.kwargs))

    def _add(self, name: str, x: Tensor) -> None:
        counts, batch = self.counts[name], (self._samples, self.task.inputs.shape[1])
        # The layout says which inputs without a sample dimension have the rows of the samples in order.
        by_sample = x.shape[:-1] == batch or (name in self.task.layout.flat and len(x) == batch[0] * batch[1])
        x = x.flatten(0, -2)
        rows = len(x)
        if not rows:
            return
        if self._weights is not None and not by_sample:
            counts.unweighted += rows
            return
        x = x.unflatten(0, batch) if by_sample else x.unsqueeze(0)
        rows_bad = (~torch.isfinite(x)).any(-1)
        bad = torch.stack([rows_bad.any(1).sum() * by_sample, rows_bad.sum()])
        new = [statistic.of(x, self._weights) for statistic in self.statistics]
        added = zip(self.statistics, counts.totals, new, strict=True) if counts.tokens else ()
        counts.totals = [statistic.add(total, each) for statistic, total, each in added] or new
        counts.bad = bad if counts.bad is None else counts.bad + bad
        counts.tokens += rows

    def results(self) -> dict[str, Observed]:
        """What was observed of each linear, over all processes.

        Raises:
            UserError: an input is not finite, or its tokens have no weights; in all processes, printed by the first.
        """
        device = self.task.device
        mine = [torch.tensor([each.tokens, each.unweighted], device=device) for each in self.counts.values()]
        bad = [torch.zeros_like(mine[0]) if each.bad is None else each.bad for each in self.counts.values()]
        summed = collectives.all_reduce_sum(torch.stack([torch.cat(pair) for pair in zip(mine, bad, strict=True)]))
        return {name: self._result(name, *numbers) for name, numbers in zip(self.counts, summed.tolist(), strict=True)}

    def _result(self, name: str, tokens: int, unweighted: int, bad_samples: int, bad_tokens: int) -> Observed:
        if unweighted:
            raise collectives.error_on_rank0(
                f"{self.task.name} {name}: token_weights 'relative' needs every token of each sample, and this linear "
                "sees some of them, or all in an order that is not known: set token_weights to 'uniform'"
            )
        if not tokens:
            return Observed(0, ())
        counts, samples = self.counts[name], len(self.task.inputs) * collectives.world_size()
        width = self.task.linear(name).in_features
        totals = counts.totals or [  # the tokens are those of other processes
            statistic.of(torch.zeros(1, 0, width, device=self.task.device), None) for statistic in self.statistics
        ]
        counts.totals = []
        totals = [statistic.reduce(total) for statistic, total in zip(self.statistics, totals, strict=True)]
        whose = f"{bad_samples} of {samples} samples" if bad_samples else f"{bad_tokens} of {tokens} tokens"
        for statistic, total in zip(self.statistics, totals, strict=True):
            if bad_tokens or (total.numel() and not all_finite(total)):  # of inputs a process may have none
                why = f"{whose} have inputs that are not" if bad_tokens else "its inputs are too large to square"
                raise collectives.error_on_rank0(
                    f"{self.task.name} {name}: the {statistic.name} is not finite, {why}; use trainer.precision "
                    "32-true or bf16-mixed, or other calibration text"
                )
        return Observed(tokens, tuple(totals))


def observe(
    task: BlockTask,
    statistics: Sequence[Statistic],
    names: Sequence[str] | None = None,
    token_weights: TokenWeights = "uniform",
    quantized: bool = True,
    samples: int | None = None,
) -> dict[str, Observed]:
    """Run the block over the quantized stream, and gather statistics of its linears' inputs over all processes.

    Args:
        task, statistics, names, token_weights, quantized: see ``Observation``.
        samples: how many to run, from the front, of this process; all if not given.

    Raises:
        UserError: see ``Observation.results``.
    """
    observation = Observation(task, statistics, names, token_weights, quantized)
    end = len(task.inputs) if samples is None else min(samples, len(task.inputs))
    with task.precision():
        for start in range(0, end, _BATCH):
            observation.run_batch(slice(start, min(start + _BATCH, end)))
    return observation.results()


class _Enough(Exception):
    """All wanted inputs have been seen: the rest of the block need not run."""


@contextmanager
def observed(block: nn.Module, names: Sequence[str], observe_input: Callable[[str, Tensor], None]) -> Iterator[None]:
    """While this is entered, ``observe_input(name, x)`` is called with every input ``[..., i]`` of these linears."""

    def hook(name: str) -> Callable[[nn.Module, tuple[Any, ...]], None]:
        return lambda module, args: observe_input(name, args[0].detach())

    handles = [block.get_submodule(name).register_forward_pre_hook(hook(name)) for name in names]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
