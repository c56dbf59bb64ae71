# SPDX-License-Identifier: Apache-2.0
"""``GPTQModule``; the equations are in ``omniq.stages.gptq``."""

from torch import Tensor

from omniq.calibration.gram import GramModule
from omniq.calibration.input_statistics import powers_of
from omniq.calibration.stacked_linears import StackedLinears
from omniq.solvers.gptq import gptq
from omniq.stages.gptq import GPTQ
from omniq.storage.block_result import QuantizedLinear


class GPTQModule(GramModule):
    """GPTQ on one block: one solver step for each stack of linears."""

    settings: GPTQ

    def solve(self, number: int, stack: StackedLinears, gram: Tensor, step: int) -> dict[str, QuantizedLinear]:
        grid, settings, rows = stack.grid, self.settings, stack.local_rows
        part = stack.select_rows(rows)
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
