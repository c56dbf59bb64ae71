# SPDX-License-Identifier: Apache-2.0
"""GPTQ (arXiv 2210.17323): one pass of error feedback through the inverse of the Gram matrix.

The arithmetic is ``omniq.solvers.gptq``. Unlike the published code the grid is chosen once, before any column moves, by
the searched range unless another clipping is given. The error of each linear is logged as
``block/007/q_proj/recon_error``.
"""

from torch import Tensor

from omniq.calibration.gram import GramModule, GramStage
from omniq.calibration.input_statistics import powers_of
from omniq.calibration.stacked_linears import StackedLinears
from omniq.calibration.task import BlockTask
from omniq.calibration.token_weights import TokenWeights
from omniq.quantizers.clipping import RangeEstimator
from omniq.solvers.gptq import gptq
from omniq.storage.block_result import QuantizedLinear


class GPTQ(GramStage):
    """GPTQ on a fixed grid.

    Args:
        clipping: the range of each group; searched by default.
        damping: added to the diagonal of the Gram matrix, as a share of its mean (0.01 in the paper).
        act_order: visit columns by descending mean square of their input.
        true_sequential: gather the inputs of a group of linears after the groups before it were quantized.
        batch_size: samples a gathering step.
        token_weights: how much each token counts in the Gram matrix; ``uniform`` as published.
    """

    def __init__(
        self,
        clipping: RangeEstimator | None = None,
        damping: float = 0.01,
        act_order: bool = False,
        true_sequential: bool = True,
        batch_size: int = 4,
        token_weights: TokenWeights = "uniform",
    ) -> None:
        super().__init__(clipping, true_sequential, batch_size, token_weights, damping)
        self.act_order = act_order

    def module(self, task: BlockTask) -> "GPTQModule":
        return GPTQModule(task, self)


class GPTQModule(GramModule):
    """A block in the hands of GPTQ: one solver step for each stack of linears."""

    settings: GPTQ

    def solve(self, number: int, stack: StackedLinears, gram: Tensor, step: int) -> dict[str, QuantizedLinear]:
        grid, settings, rows = stack.grid, self.settings, stack.my_rows
        part = stack.part(rows)
        part.fitted = grid.fit(*settings.clipping.range(part.weight, grid, self.second_moment(number)))
        rounded = gptq(
            part.weight,
            gram,
            part.scale,
            part.zero_point,
            grid.bits,
            damping=settings.damping,
            act_order=settings.act_order,
        )
        errors = powers_of(part.weight - rounded.values(), gram)
        self.track_errors(stack, rows, errors, powers_of(part.weight, gram))
        stack.fitted = stack.gather(part.scale), stack.gather(part.zero_point)
        return stack.linears(stack.gather(rounded.codes))
