# SPDX-License-Identifier: Apache-2.0
"""``SpQRModule``; the equations are in ``omniq.stages.spqr``."""

from torch import Tensor

from omniq.calibration.gram import GramModule
from omniq.calibration.input_statistics import power_of, relative_error
from omniq.calibration.stacked_linears import StackedLinears
from omniq.solvers.spqr import Feedback, spqr
from omniq.stages.spqr import SpQR
from omniq.storage.block_result import BlockResult, Outliers, QuantizedLinear


class SpQRModule(GramModule):
    """SpQR on one block: one solver step for each stack of linears."""

    settings: SpQR

    def solve(self, number: int, stack: StackedLinears, gram: Tensor, step: int) -> dict[str, QuantizedLinear]:
        settings, grid = self.settings, self.settings.grid(stack.grid)
        feedback = Feedback.of(gram, grid.groups(len(gram)), damping=settings.damping, act_order=settings.act_order)
        found = {}
        for name, weight in stack.split(stack.weight):
            codes, scale, zero_point, sparse = spqr(weight, feedback, grid, settings.clipping, settings.threshold)
            outliers = None if sparse is None else Outliers.from_dense(sparse)
            found[name] = QuantizedLinear.of(grid, codes, scale, zero_point, outliers)
            missed = weight - grid.dequantize(codes, scale, zero_point)
            missed = missed if sparse is None else missed - sparse
            error = relative_error(power_of(missed, gram), power_of(weight, gram))
            self.track(f"{name.rpartition('.')[2]}/recon_error", error)
        return found

    def finish(self) -> BlockResult:
        linears = self.found.values()
        weights = sum(linear.codes.numel() for linear in linears)
        outliers = sum(linear.outliers.value.numel() for linear in linears if linear.outliers is not None)
        bits = sum(linear.bits_per_weight() * linear.codes.numel() for linear in linears)
        return super().finish().with_summary(outliers=outliers / weights, bits_per_weight=bits / weights)
