# SPDX-License-Identifier: Apache-2.0
"""SpQR (arXiv 2306.03078): small groups whose scales are codes themselves, and the most sensitive weights in float16.

The arithmetic is ``omniq.solvers.spqr``, how scales and zero points are stored ``omniq.grid.quantized_scales``. With
codes of ``b`` bits in groups of ``g`` and ``k`` bits a scale, a weight takes

    b + k / g + 2 * 16 / (g rows) + b / g + 32 share        bits

``share`` is that of the outliers, each a float16 and the number of its column: 3.5 bits at W3A16g16 without outliers,
3.8 with one per cent. Choose the small groups by the scheme, such as ``W3A16g16``. Only export format ``omniq`` holds
outliers and second levels, and what ``bits_per_weight`` counts is what it stores.

Zero points are integers of ``b`` bits. A second level of as many bits or more (``zero_bits`` 3 at W3) could only store
more, so it is left out there; at W4 it saves 0.03 bits a weight. (In the paper zero points are real numbers, for which
3 bits are always a saving.) All values between the least and the greatest zero point of a run are kept exactly as long
as these are at most ``2^zero_bits - 1`` apart.

Linears that share an input share one inverse, but thresholds and runs of rows are those of each linear alone.
"""

import math
from collections.abc import Mapping
from dataclasses import replace
from typing import ClassVar

from torch import Tensor

from omniq.calibration.gram import GramModule, GramStage
from omniq.calibration.input_statistics import power_of, relative
from omniq.calibration.stacked_linears import StackedLinears
from omniq.calibration.stage import Part
from omniq.calibration.task import BlockTask
from omniq.errors import UserError
from omniq.grid.affine import Grid
from omniq.grid.quantized_scales import QuantizedScales
from omniq.quantizers.clipping import MinMax, RangeEstimator
from omniq.solvers.spqr import Feedback, spqr
from omniq.storage.block_result import BlockResult, Outliers, QuantizedLinear


class SpQR(GramStage):
    """SpQR.

    Args:
        threshold: a weight is kept in float16 if rounding it costs more than this many times the mean cost of leaving
            a weight out (0.2 in the published scripts, for 4 bits); 0 for no outliers. On layers of SmolLM2 at W3A16g16
            0.2 keeps 2 per cent of the weights, 0.5 half a per cent.
        scale_bits: of a scale's code, 2 to 8; 0 to store scales as they are.
        zero_bits: of a zero point's code, 2 to 8; 0 to store zero points as they are, and so if not fewer than the
            bits of the weights.
        scale_group: output features whose scales share a range (16 in the paper).
        clipping: the range of each group; min-max by default, as in the paper. ``Searched`` has 1 to 9 per cent less
            error on layers of SmolLM2 and takes three times as long, on a GPU more.
        damping: added to the diagonal of the Gram matrix, as a share of its mean.
        act_order: visit groups, and columns inside of them, by descending mean square of their input, as the published
            scripts do (a fifth less error on layers of SmolLM2).
        true_sequential: gather the inputs of a group of linears after the groups before it were quantized.
        batch_size: samples a gathering step.

    Raises:
        UserError: a threshold, second level or clipping that cannot work; see ``GramStage``.
    """

    settings_that_omit: ClassVar[Mapping[Part, str]] = {
        "outliers": "threshold 0",
        "scale codes": "scale_bits 0 and zero_bits 0",
    }

    def __init__(
        self,
        threshold: float = 0.2,
        scale_bits: int = 3,
        zero_bits: int = 3,
        scale_group: int = 16,
        clipping: RangeEstimator | None = None,
        damping: float = 0.01,
        act_order: bool = True,
        true_sequential: bool = True,
        batch_size: int = 4,
    ) -> None:
        super().__init__(clipping or MinMax(), true_sequential, batch_size, damping=damping)
        if not 0 <= threshold < math.inf:
            raise UserError(f"threshold {threshold} of SpQR is not usable: give 0 for no outliers, or such as 0.2")
        if self.clipping.needs_gram:
            raise UserError(
                "clipping of SpQR with weighting 'gram' does not suit a stage that compensates for errors: use "
                "'diagonal'"
            )
        self.second = QuantizedScales(scale_bits, zero_bits, scale_group)
        self.threshold, self.act_order = threshold, act_order

    @property
    def leaves(self) -> frozenset[Part]:
        outliers: set[Part] = {"outliers"} if self.threshold else set()
        scale_codes: set[Part] = {"scale codes"} if self.second.scale_bits or self.second.zero_bits else set()
        return super().leaves | outliers | scale_codes

    def grid(self, grid: Grid) -> Grid:
        """The grid that was asked for, with as much of a second level as saves anything on it."""
        zero_bits = self.second.zero_bits if self.second.zero_bits < grid.bits and not grid.symmetric else 0
        second = replace(self.second, zero_bits=zero_bits)
        return replace(grid, second=second if second.scale_bits or second.zero_bits else None)

    def module(self, task: BlockTask) -> "SpQRModule":
        return SpQRModule(task, self)


class SpQRModule(GramModule):
    """A block in the hands of SpQR: one solver step for each stack of linears."""

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
            error = relative(power_of(missed, gram), power_of(weight, gram))
            self.track(f"{name.rpartition('.')[2]}/recon_error", error)
        return found

    def finish(self) -> BlockResult:
        linears = self.found.values()
        weights = sum(linear.codes.numel() for linear in linears)
        outliers = sum(linear.outliers.value.numel() for linear in linears if linear.outliers is not None)
        bits = sum(linear.bits_per_weight() * linear.codes.numel() for linear in linears)
        return super().finish().with_summary(outliers=outliers / weights, bits_per_weight=bits / weights)
