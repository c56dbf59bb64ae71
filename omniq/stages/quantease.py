# SPDX-License-Identifier: Apache-2.0
"""QuantEase (arXiv 2309.01885): cyclic coordinate descent on the codes of each layer, without gradients.

For the linears of one shared input, with Gram matrix S of that input,

    minimise ||(W - W^) X||^2 = tr((W - W^) S (W - W^)^T)   with W^ on its grid

one column after the other; each column is rounded to its best grid points given all other columns. The optimizer is
``CoordinateDescent`` (``omniq/solvers/coordinate_descent.py``, with the equations of a sweep): one ``step()`` is one
sweep, and every third sweep does not round. The error of each linear is logged after every sweep as
``block/007/q_proj/recon_error``. It is the error of the current iterate, not of the best codes, which the optimizer
keeps.

The starting point and the grid are independent choices. The target is always the original weights, which the published
``gptq_quantease`` gets wrong. After another stage, QuantEase keeps the grid of that stage by default, which preserves
learned clipping. After a stage that has chosen codes (GPTQ), it must continue from these codes (``start: previous``).
Outliers are kept beside the codes in float16, with one of two methods: the masked sweep leaves the chosen
entries unrounded; Algorithm 3 chooses them again in each sweep.

Deviations from the published code: a searched grid instead of min-max, a best iterate for each row, an early stop,
blocked arithmetic with the same codes, and damping. Groups always consist of neighbouring columns in the original order
(the published ``--static-groups``), because runtimes no longer read scattered groups. Each of several processes solves
a share of the rows and then gathers codes, scales and outliers; with Algorithm 3, each process solves all rows.
"""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, ClassVar, Literal

from omniq.calibration.outlier_settings import Method, OutlierSettings, Support
from omniq.calibration.settings import GramStage, TokenWeights
from omniq.calibration.stage import Part, Stage
from omniq.errors import UserError
from omniq.quantizers.clipping import RangeEstimator

if TYPE_CHECKING:  # settings are parsed without torch
    from omniq.calibration.module import BlockModule
    from omniq.calibration.task import BlockTask

Start = Literal["weights", "nearest", "gptq", "previous"]


class QuantEase(GramStage):
    """Coordinate descent on the codes.

    Args:
        sweeps: number of passes over all columns (30 in the published code).
        start: initial weights: ``weights`` for the original ones (published; the first sweep rounds them), ``nearest``
            for round-to-nearest, ``gptq`` for the result of GPTQ, or ``previous`` for the codes of the previous stage.
        grid: ``clipping`` chooses a new grid, ``previous`` keeps the grid of the previous stage, and ``auto`` keeps it
            if there is a previous stage.
        clipping: how to choose the range of each group; searched by default. Not used if the previous grid is kept.
        damping: the fraction of the mean diagonal of the Gram matrix to add to its diagonal.
        act_order: visit columns in descending order of the mean square of their input (measured: slightly worse).
        refit_scales: refit scales by least squares between sweeps; a new scale is kept where the error decreases.
        outliers: weights to keep in float16 beside the codes; a plain number is per cent (earlier spelling).
        precision: precision of the matrix products on a GPU.
        true_sequential: gather the inputs of a group of linears after the earlier groups have been quantized.
        batch_size: samples per gathering step.
        token_weights: the weight of each token in the Gram matrix; ``uniform`` as published.
        outlier_columns: earlier spelling of ``outliers.columns``.
        outlier_support: earlier spelling of ``outliers.support``.
        outlier_method: earlier spelling of ``outliers.method``.

    Raises:
        UserError: ``sweeps`` is less than 1, the outliers are out of range, or Algorithm 3 does not support ``start``;
            see ``GramStage``.
    """

    settings_that_take: ClassVar[Mapping[Part, str]] = {"grid": "start 'previous'", "codes": "start 'previous'"}
    settings_that_omit: ClassVar[Mapping[Part, str]] = {"outliers": "outliers 0"}

    def __init__(
        self,
        sweeps: int = 30,
        start: Start = "weights",
        grid: Literal["auto", "clipping", "previous"] = "auto",
        clipping: RangeEstimator | None = None,
        damping: float = 0.01,
        act_order: bool = False,
        refit_scales: bool = False,
        outliers: OutlierSettings | float | None = None,
        precision: Literal["float32", "tf32", "float64"] = "float32",
        true_sequential: bool = True,
        batch_size: int = 4,
        token_weights: TokenWeights = "uniform",
        outlier_columns: bool | None = None,
        outlier_support: Support | None = None,
        outlier_method: Method | None = None,
    ) -> None:
        super().__init__(clipping, true_sequential, batch_size, token_weights, damping)
        if sweeps < 1:
            raise UserError(f"sweeps {sweeps} of QuantEase is too small: give 1 or more (30 is usual)")
        earlier = {"columns": outlier_columns, "support": outlier_support, "method": outlier_method}
        self.outliers = OutlierSettings.of_earlier_release(outliers, earlier)
        if self.algorithm3 and start != "weights":
            raise UserError(f"start {start!r} of QuantEase is not supported by Algorithm 3: use 'weights'")
        self.sweeps, self.start, self.grid = sweeps, start, grid
        self.act_order, self.refit_scales, self.precision = act_order, refit_scales, precision

    def check_place_in_list(self, before: Sequence[Stage]) -> None:
        if not before and (self.start == "previous" or self.grid == "previous"):
            what = "start" if self.start == "previous" else "grid"
            raise UserError(
                f"stages: QuantEase with {what} 'previous' needs a preceding stage: put another stage first, or change "
                f"{what}"
            )

    @property
    def takes(self) -> frozenset[Part]:
        """A start from previous codes also takes their grid, even if a new grid follows: their values lie on it."""
        if self.start == "previous":
            return frozenset({"block", "grid", "codes"})
        return frozenset({"block"} if self.grid == "clipping" else {"block", "grid"})

    @property
    def leaves(self) -> frozenset[Part]:
        return super().leaves | ({"outliers"} if self.outliers else set())

    @property
    def algorithm3(self) -> bool:
        """True if the support of the outliers changes from sweep to sweep."""
        return self.outliers is not None and self.outliers.method == "algorithm3"

    def module(self, task: "BlockTask") -> "BlockModule":
        from omniq.stages.modules.quantease import QuantEaseModule

        return QuantEaseModule(task, self)
