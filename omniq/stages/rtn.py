# SPDX-License-Identifier: Apache-2.0
"""Round to nearest: every weight goes to the nearest point of its grid, without looking at what the layer computes.

The baseline of every table. With min-max clipping it needs no data; with a searched range it uses the mean square of
each input.
"""

import torch
from torch import Tensor

from omniq.quantizers.clipping import Clipping, MinMax
from omniq.quantizers.grid import Grid
from omniq.result import BlockResult, QuantizedLinear
from omniq.stages.base import BlockModule, BlockTask, PassLoader, Stage
from omniq.stages.statistics import importance_for


class RTN(Stage):
    """Round to nearest.

    Args:
        clipping: the range of each group; min-max by default.
    """

    def __init__(self, clipping: Clipping | None = None) -> None:
        self.clipping = clipping or MinMax()

    def module(self, task: BlockTask) -> "RTNModule":
        return RTNModule(task, self.clipping)


class RTNModule(BlockModule):
    """A block that is rounded once; its single step learns nothing."""

    def __init__(self, task: BlockTask, clipping: Clipping) -> None:
        super().__init__(task)
        self.clipping = clipping
        self.automatic_optimization = False

    def loader(self) -> PassLoader:
        return PassLoader(samples=1)

    def training_step(self, indices: Tensor) -> None:
        """Nothing to do before ``finish``."""

    def configure_optimizers(self) -> None:
        """No parameters, no optimizer."""

    @torch.no_grad()
    def finish(self) -> BlockResult:
        importance = importance_for(self.clipping, self.task)
        linears = {}
        for name in self.task.family.linears:
            weight = self.task.linear(name).weight
            linears[name] = round_to_nearest(weight, self.task.grid, self.clipping, importance.get(name))
        return BlockResult(linears, self.task.plain_tensors())


@torch.no_grad()
def round_to_nearest(
    weight: Tensor, grid: Grid, clipping: Clipping | None = None, importance: Tensor | None = None
) -> QuantizedLinear:
    """The nearest codes of one weight ``[o, i]`` on the grid that its clipping gives."""
    scale, zero_point = grid.fit(*(clipping or MinMax()).range(weight, grid, importance))
    return QuantizedLinear.of(grid, grid.quantize(weight.float(), scale, zero_point), scale, zero_point)


@torch.no_grad()
def rounded_to_nearest(weight: Tensor, grid: Grid) -> Tensor:
    """What that leaves of a float32 weight ``[o, i]`` on its min-max grid, where it is: to the bit what is deployed."""
    scale, zero_point = grid.fit(*grid.range(weight))
    return grid.dequantize(grid.quantize(weight, scale, zero_point), scale, zero_point)
