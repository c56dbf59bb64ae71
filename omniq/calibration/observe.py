# SPDX-License-Identifier: Apache-2.0
"""Gather statistics of the inputs of a block's linears by running the block on the quantized stream.

All stages gather statistics with ``observe``. A stage that gathers over several training steps uses ``Observation``
directly. Linears that share an input share its statistics, so only one linear of each group is observed. All sums
accumulate on the device, without host synchronisation (``omniq.calibration.input_statistics``).

An expert of a mixture sees any number of tokens, zero included. The rows of its input do not correspond to samples:
they are summed as if they were one sample. Relative token weights need the token of each row, so they are refused
there. If no token of any process reaches a linear, ``Observed.tokens`` is 0 in all processes.

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
from omniq.calibration.settings import TokenWeights
from omniq.calibration.task import BlockTask
from omniq.calibration.token_weights import relative_weights
from omniq.distributed import collectives
from omniq.kernels.layer_problem import all_finite

_BATCH = 4  # samples per forward


@dataclass(frozen=True)
class Observed:
    """The statistics of one input, over all processes.

    Args:
        tokens: number of observed tokens.
        totals: the statistics in the requested order; empty if no token was observed.
    """

    tokens: int
    totals: tuple[Tensor, ...]


@dataclass
class _Counts:
    """The statistics of one input that one process has gathered so far.

    Args:
        tokens: number of rows in the sums.
        unweighted: number of rows left out because their token weights are unknown.
        bad: numbers of non-finite samples and rows, int64 ``[2]`` on the device. Samples are counted only where rows
            correspond to samples.
        totals: the statistics.
        in_order: True if the linear was called before every later group, as the layout declares.
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
        statistics: the statistics to gather.
        names: names of the linears to observe; by default the first of each group.
        token_weights: the weight of each token in a sum.
        quantized: run the block on quantized activations, as the exported model does.
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
        """Run the block on some samples, only as far as the observed inputs require.

        The forward stops when every observed linear has been called. If a linear was called before every later group in
        an earlier batch, and a later group is called now, no token of this batch reaches that linear; the forward does
        not wait for it.

        Args:
            samples: indices of the samples, or a slice of the stream.
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
                raise _StopForward

        activations = task.quantized_activations() if self.quantized else nullcontext()
        with activations, observed(task.block, (*self.counts, *self._later), observe_input), suppress(_StopForward):
            functional_call(task.block, dict(tensors or {}), (inputs,), dict(task.kwargs))

    def _add(self, name: str, x: Tensor) -> None:
        counts, batch = self.counts[name], (self._samples, self.task.inputs.shape[1])
        # The layout declares which inputs have no sample dimension but keep the rows of all samples in order.
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
        """The statistics of each linear, over all processes.

        Raises:
            UserError: an input is not finite, or its tokens have no weights. All processes raise; rank 0 prints.
        """
        device = self.task.device
        rows = [torch.tensor([each.tokens, each.unweighted], device=device) for each in self.counts.values()]
        bad = [torch.zeros_like(rows[0]) if each.bad is None else each.bad for each in self.counts.values()]
        summed = collectives.all_reduce_sum(torch.stack([torch.cat(pair) for pair in zip(rows, bad, strict=True)]))
        return {name: self._result(name, *numbers) for name, numbers in zip(self.counts, summed.tolist(), strict=True)}

    def _result(self, name: str, tokens: int, unweighted: int, bad_samples: int, bad_tokens: int) -> Observed:
        if unweighted:
            raise collectives.error_on_rank0(
                f"{self.task.name} {name}: token_weights 'relative' needs all tokens of each sample in order, but this "
                "linear sees only some of them or an unknown order: set token_weights to 'uniform'"
            )
        if not tokens:
            return Observed(0, ())
        counts, samples = self.counts[name], len(self.task.inputs) * collectives.world_size()
        width = self.task.linear(name).in_features
        totals = counts.totals or [  # only other processes have tokens for this linear
            statistic.of(torch.zeros(1, 0, width, device=self.task.device), None) for statistic in self.statistics
        ]
        counts.totals = []
        totals = [statistic.reduce(total) for statistic, total in zip(self.statistics, totals, strict=True)]
        whose = f"{bad_samples} of {samples} samples" if bad_samples else f"{bad_tokens} of {tokens} tokens"
        for statistic, total in zip(self.statistics, totals, strict=True):
            if bad_tokens or (total.numel() and not all_finite(total)):  # InputRows may be empty in a process
                why = f"{whose} have non-finite inputs" if bad_tokens else "its inputs are too large to square"
                raise collectives.error_on_rank0(
                    f"{self.task.name} {name}: the {statistic.name} is not finite because {why}: set trainer.precision "
                    "to 32-true or bf16-mixed, or use other calibration text"
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
    """Run the block on the quantized stream and gather statistics of its linears' inputs over all processes.

    Args:
        task, statistics, names, token_weights, quantized: see ``Observation``.
        samples: number of samples of this process to run, from the first; by default all.

    Raises:
        UserError: see ``Observation.results``.
    """
    observation = Observation(task, statistics, names, token_weights, quantized)
    end = len(task.inputs) if samples is None else min(samples, len(task.inputs))
    with task.precision():
        for start in range(0, end, _BATCH):
            observation.run_batch(slice(start, min(start + _BATCH, end)))
    return observation.results()


class _StopForward(Exception):
    """Ends the forward of the block: all observed inputs have been seen."""


@contextmanager
def observed(block: nn.Module, names: Sequence[str], observe_input: Callable[[str, Tensor], None]) -> Iterator[None]:
    """Context in which ``observe_input(name, x)`` is called with every input ``[..., i]`` of these linears."""

    def hook(name: str) -> Callable[[nn.Module, tuple[Any, ...]], None]:
        return lambda module, args: observe_input(name, args[0].detach())

    handles = [block.get_submodule(name).register_forward_pre_hook(hook(name)) for name in names]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
