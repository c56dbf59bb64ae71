# SPDX-License-Identifier: Apache-2.0
"""``OutlierSuppressionModule``; the equations are in ``omniq.stages.outlier_suppression``.

Shapes: ``n`` samples, ``t`` tokens of a sample, ``i`` input features, ``c`` parameters of an equivalence.
"""

import torch
from torch import Tensor

from omniq.calibration.fuse import block_transform, fuse, input_ranges
from omniq.calibration.input_statistics import InputRows
from omniq.calibration.observe import observe
from omniq.calibration.rounding import RTNModule
from omniq.calibration.task import BlockTask
from omniq.distributed import collectives
from omniq.grid.affine import rounded_to_nearest
from omniq.quantizers.activations import quantize_samples, quantize_tokens
from omniq.stages.outlier_suppression import KINDS, OutlierSuppression
from omniq.storage.block_result import BlockResult
from omniq.transforms.equivalence import Equivalence
from omniq.transforms.heads import Heads
from omniq.transforms.initial import ChannelRanges


class OutlierSuppressionModule(RTNModule):
    """Suppresses the outliers of one block and rounds it once."""

    def __init__(self, task: BlockTask, settings: OutlierSuppression) -> None:
        super().__init__(task, settings.clipping)
        self.settings = settings

    @torch.no_grad()
    def finish(self) -> BlockResult:
        task = self.task
        transform = block_transform(task, KINDS, shift=True)
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
