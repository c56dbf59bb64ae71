# SPDX-License-Identifier: Apache-2.0
"""SpQR (arXiv 2306.03078, Algorithm 1): small groups with quantized scales, and the most sensitive weights in float16.

With ``U`` the Cholesky factor of GPTQ (``omniq.stages.gptq``), rounding a weight ``w_j`` to ``q_j`` costs

    d_j (w_j - q_j)^2,      d_j = 1 / U_jj^2

after all later columns have compensated for the error. A weight is an outlier if this cost exceeds a threshold.

For each linear:

1. Choose grids of small groups with quantized scales and zero points (``omniq.grid.quantized_scales``).
2. Round the columns with the error feedback of GPTQ, and keep outliers in float16 (``omniq.solvers.spqr``).

With codes of ``b`` bits in groups of ``g``, ``k`` bits per scale and runs of ``rows`` output features, a weight takes

    b + k / g + 2 * 16 / (g rows) + b / g + 32 share        bits

where ``share`` is the fraction of outliers; each outlier is stored as a float16 value and a column index. W3A16g16
takes 3.5 bits without outliers, and 3.8 with one per cent. The scheme sets the small groups, such as ``W3A16g16``. Only
export format ``omniq`` stores outliers and quantized scales; ``bits_per_weight`` counts the bits that it stores.

Linears that share an input share one inverse, but each linear has its own threshold and its own runs of rows.

Deviation from the paper: zero points are integers of ``b`` bits instead of real numbers, for which 3-bit codes always
save space. Codes of as many bits or more (``zero_bits`` 3 at W3) cannot save space, so zero points are stored as they
are there; at W4, codes save 0.03 bits per weight. All zero points of a run are kept exactly as long as the smallest and
the largest are at most ``2^zero_bits - 1`` apart.
"""

import math
from collections.abc import Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, ClassVar

from omniq.calibration.settings import GramStage
from omniq.calibration.stage import Part
from omniq.errors import UserError
from omniq.grid.name import check_scale_codes
from omniq.quantizers.clipping import MinMax, RangeEstimator

if TYPE_CHECKING:  # settings are parsed without torch
    from omniq.calibration.module import BlockModule
    from omniq.calibration.task import BlockTask
    from omniq.grid.affine import Grid


class SpQR(GramStage):
    """SpQR.

    Args:
        threshold: keep a weight in float16 if rounding it costs more than this multiple of the mean cost of leaving a
            weight out (0.2 in the published scripts, for 4 bits); 0 for no outliers. On layers of SmolLM2 at W3A16g16,
            0.2 keeps 2 per cent of the weights and 0.5 keeps half a per cent.
        scale_bits: bits of the code of a scale, 2 to 8; 0 to store scales without codes.
        zero_bits: bits of the code of a zero point, 2 to 8; 0 to store zero points without codes. Zero points are also
            stored without codes if this is not less than the bits of the weights.
        scale_group: number of output features whose scales share a range (16 in the paper).
        clipping: how to choose the range of each group; min-max by default, as in the paper. On layers of SmolLM2,
            ``Searched`` has 1 to 9 per cent less error and takes three times as long (more on a GPU).
        damping: the fraction of the mean diagonal of the Gram matrix to add to its diagonal.
        act_order: quantize groups, and columns inside them, in descending order of the mean square of their input, as
            the published scripts do (a fifth less error on layers of SmolLM2).
        true_sequential: gather the inputs of a group of linears after the earlier groups have been quantized.
        batch_size: samples per gathering step.

    Raises:
        UserError: the threshold, ``scale_bits``, ``zero_bits`` or ``scale_group`` is out of range, or the clipping is
            not supported; see ``GramStage``.
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
            raise UserError(
                f"threshold {threshold} of SpQR is out of range: give 0 for no outliers, or a number such as 0.2"
            )
        if self.clipping.needs_gram:
            raise UserError(
                "clipping of SpQR does not support weighting 'gram', because SpQR compensates for rounding errors: use "
                "'diagonal'"
            )
        check_scale_codes(scale_bits, zero_bits, scale_group)
        self.scale_bits, self.zero_bits, self.scale_group = scale_bits, zero_bits, scale_group
        self.threshold, self.act_order = threshold, act_order

    @property
    def leaves(self) -> frozenset[Part]:
        outliers: set[Part] = {"outliers"} if self.threshold else set()
        scale_codes: set[Part] = {"scale codes"} if self.scale_bits or self.zero_bits else set()
        return super().leaves | outliers | scale_codes

    def grid(self, grid: "Grid") -> "Grid":
        """The grid of the scheme, with codes for scales and zero points where they save space."""
        from omniq.grid.quantized_scales import QuantizedScales

        zero_bits = self.zero_bits if self.zero_bits < grid.bits and not grid.symmetric else 0
        second = QuantizedScales(self.scale_bits, zero_bits, self.scale_group)
        return replace(grid, second=second if second.scale_bits or second.zero_bits else None)

    def module(self, task: "BlockTask") -> "BlockModule":
        from omniq.stages.modules.spqr import SpQRModule

        return SpQRModule(task, self)
