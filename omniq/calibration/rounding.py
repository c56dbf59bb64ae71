# SPDX-License-Identifier: Apache-2.0
"""Round to nearest: the module of ``RTN``, and the base of stages that transform a block and then round it."""

import torch
from torch import Tensor

from omniq.calibration.loader import PassLoader
from omniq.calibration.module import BlockModule
from omniq.calibration.second_moments import second_moments_for
from omniq.calibration.task import BlockTask
from omniq.grid.affine import Grid
from omniq.quantizers.clipping import MinMax, RangeEstimator
from omniq.storage.block_result import BlockResult, QuantizedLinear


class RTNModule(BlockModule):
    """Rounds a block once, in ``finish``; its single training step does nothing."""

    def __init__(self, task: BlockTask, clipping: RangeEstimator) -> None:
        super().__init__(task)
        self.clipping = clipping
        self.automatic_optimization = False

    def loader(self) -> PassLoader:
        return PassLoader(samples=1)

    def training_step(self, indices: Tensor) -> None:
        """Do nothing: ``finish`` does all the work."""

    def configure_optimizers(self) -> None:
        """Give Lightning no optimizer: the module has no parameters."""

    @torch.no_grad()
    def finish(self) -> BlockResult:
        second_moment = second_moments_for(self.clipping, self.task)
        linears = {}
        for name in self.task.layout.linears:
            weight = self.task.linear(name).weight
            linears[name] = round_to_nearest(weight, self.task.grids[name], self.clipping, second_moment.get(name))
        return BlockResult(linears, self.task.plain_tensors())


@torch.no_grad()
def round_to_nearest(
    weight: Tensor, grid: Grid, clipping: RangeEstimator | None = None, second_moment: Tensor | None = None
) -> QuantizedLinear:
    """Round one weight ``[o, i]`` to the nearest codes on the grid that the clipping chooses."""
    scale, zero_point = grid.fit(*(clipping or MinMax()).range(weight, grid, second_moment))
    return QuantizedLinear.of(grid, grid.quantize(weight.float(), scale, zero_point), scale, zero_point)
