# SPDX-License-Identifier: Apache-2.0
"""Outlier Suppression+ (arXiv 2304.09145): center channels by shifts, scale outliers down, then round to nearest.

For the inputs ``X`` of linears ``W`` with channel ranges ``[lo_j, hi_j]`` and a threshold ``t`` (section 4):

    d_j = (hi_j + lo_j) / 2                                          shift
    s_j = max(1, max|x_j - d_j| / t)                                 scale: changes only channels beyond t
    t   = argmin || Q((X - d) / s) Q(W s)^T - (X - d) W^T ||^2       over a few samples, independently for each input

1. Measure the channel ranges on the quantized stream, and compute the shifts.
2. Try evenly spaced thresholds, from the largest channel down. The first one leaves all scales at one.
3. Fuse shifts and scales into the block, then round to nearest.

The stage uses no gradients. Alone, it is the baseline of this name; before another stage, it prepares the block.
Several processes use the same samples as a single process: each evaluates the samples that it holds, and the errors are
summed.

Deviations: shifts are used only where the stock module can store the resulting biases (in LLaMA from values to output),
instead of a norm with its own bias. The objective is summed over all readers of an input, as published for q, k and v.

Shapes: ``n`` samples, ``t`` tokens of a sample, ``i`` input features, ``o`` output features, ``c`` parameters of an
equivalence.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from omniq.calibration.fuse import block_transform, check_equivalences, fuse, input_ranges
from omniq.calibration.input_statistics import InputRows
from omniq.calibration.observe import observe
from omniq.calibration.rounding import RTNModule
from omniq.calibration.stage import Part, Stage
from omniq.calibration.task import BlockTask
from omniq.distributed import collectives
from omniq.errors import UserError
from omniq.grid.affine import rounded_to_nearest
from omniq.grid.scheme import Activations
from omniq.models.layout import Layout
from omniq.quantizers.activations import quantize_samples, quantize_tokens
from omniq.quantizers.clipping import MinMax, RangeEstimator
from omniq.storage.block_result import BlockResult
from omniq.transforms.equivalence import Equivalence
from omniq.transforms.heads import Heads
from omniq.transforms.initial import ChannelRanges

_KINDS = ("norm", "value_output")


class OutlierSuppression(Stage):
    """Shifts and searched scales, without learning.

    Args:
        candidates: number of thresholds to try for each input.
        samples: number of calibration samples for the search, over all processes.
        clipping: how to choose the range of each group of weights; min-max by default.

    Raises:
        UserError: ``candidates`` or ``samples`` is less than 1.
    """

    def __init__(self, candidates: int = 20, samples: int = 8, clipping: RangeEstimator | None = None) -> None:
        for name, value in (("candidates", candidates), ("samples", samples)):
            if value < 1:
                raise UserError(f"stages: OutlierSuppression.{name} {value} is too small: give 1 or more")
        self.candidates, self.samples, self.clipping = candidates, samples, clipping or MinMax()

    @property
    def leaves(self) -> frozenset[Part]:
        return frozenset({"block"})

    def check_layout(self, layout: Layout) -> None:
        check_equivalences(layout, _KINDS, "stages: OutlierSuppression")

    def equivalence_kinds(self, layout: Layout, activations: Activations) -> Sequence[str]:
        return _KINDS

    def module(self, task: BlockTask) -> "OutlierSuppressionModule":
        return OutlierSuppressionModule(task, self)


class OutlierSuppressionModule(RTNModule):
    """Suppresses the outliers of one block and rounds it once."""

    def __init__(self, task: BlockTask, settings: OutlierSuppression) -> None:
        super().__init__(task, settings.clipping)
        self.settings = settings

    @torch.no_grad()
    def finish(self) -> BlockResult:
        task = self.task
        transform = block_transform(task, _KINDS, shift=True)
        ranges = input_ranges(task)
        values = transform.initial(dict(task.block.named_parameters()), ranges, alpha=None)
        inputs = self._inputs()
        for key, equivalence in transform.equivalences.items():
            if not any(name in inputs for name in equivalence.readers):  # no token reaches them: scales stay at one
                continue
            shift = values.get(f"{key}/shift")
            scale = self._scale(equivalence, transform.heads, ranges, shift, inputs)
            values[f"{key}/log_scale"] = scale.log() / equivalence.power
        fuse(task.block, transform, transform.parameters(values).to(task.device))
        return super().finish()

    def _inputs(self) -> dict[str, Tensor]:
        """Inputs of the linears in this process's share of the first samples of the run, each ``[n, t, i]``.

        ``n`` may be 0. It is 1 for a linear that sees only some tokens. A linear that no token reaches has no entry.
        """
        task, length = self.task, self.task.inputs.shape[1]
        share = len(range(collectives.rank(), self.settings.samples, collectives.world_size()))
        seen = observe(task, [InputRows()], quantized=False, samples=share)
        inputs: dict[str, Tensor] = {}
        for group in task.layout.groups:
            if seen[group[0]].tokens:
                (rows,) = seen[group[0]].totals
                by_sample = len(rows) == min(share, len(task.inputs)) * length
                samples = rows.unflatten(0, (-1, length)) if by_sample else rows.unsqueeze(0)
                inputs |= dict.fromkeys(group, samples)
        return inputs

    def _scale(
        self,
        equivalence: Equivalence,
        heads: Heads,
        ranges: ChannelRanges,
        shift: Tensor | None,
        inputs: dict[str, Tensor],
    ) -> Tensor:
        """The scales ``[c]`` for the best threshold."""
        readers = tuple(name for name in equivalence.readers if name in self.task.layout.linears)
        first = next(name for name in readers if name in inputs)
        lo, hi, x = ranges.lo[first], ranges.hi[first], inputs[first]
        if shift is not None:
            wide = equivalence.to_inputs(shift, heads)
            lo, hi, x = lo - wide, hi - wide, x - wide
        size = torch.maximum(hi, -lo)  # [i]
        size = equivalence.by_parameter(size, heads).amax(1)  # [c]
        best = size.new_ones(size.shape)
        least = size.new_full((), torch.inf, dtype=torch.float64)
        for step in range(self.settings.candidates):
            threshold = size.max() * (1 - step / self.settings.candidates)
            scale = (size / threshold.clamp(min=torch.finfo(size.dtype).tiny)).clamp(min=1)
            error = self._error(readers, x, equivalence.to_inputs(scale, heads))
            best, least = torch.where(error < least, scale, best), torch.minimum(error, least)
        return best

    def _error(self, readers: tuple[str, ...], x: Tensor, scale: Tensor) -> Tensor:
        """Squared error of the outputs of the quantized readers, summed over samples and processes in float64."""
        given, total = self.task.activations, x.new_zeros((), dtype=torch.float64)
        if not len(x):
            return collectives.all_reduce_sum(total)
        scaled = x / scale
        if given.inputs != 16:
            quantize = quantize_samples if given.static else quantize_tokens
            scaled = quantize(scaled, given.inputs, given.symmetric)
        for name in readers:
            weight = self.task.linear(name).weight.float()
            rounded = rounded_to_nearest(weight * scale, self.task.grids[name])
            total += (scaled @ rounded.t() - x @ weight.t()).square().sum((1, 2)).double().sum()
        return collectives.all_reduce_sum(total)
