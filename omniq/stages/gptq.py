# SPDX-License-Identifier: Apache-2.0
"""GPTQ (arXiv 2210.17323, Algorithm 1): one pass of error feedback through the inverse of the Gram matrix.

For each row ``w`` of a linear with Gram matrix ``S = X X^T`` (GPTQ calls ``2 S`` the Hessian), minimise
``||(w - w^) X||^2``: round the columns in order, and spread each error over the columns that follow. With ``U`` the
upper Cholesky factor of the inverse of the damped ``S``:

    q_j = Q(w_j),    e_j = (w_j - q_j) / U_jj,    w_k <- w_k - e_j U_jk      for k > j

Steps: gather S (``omniq.calibration.gram``), choose the grid, run the solver (``omniq.solvers.gptq``). The error of
each linear is logged as ``block/007/q_proj/recon_error``.

Deviation from the published code: the grid is chosen once, before any column changes, and by the searched range unless
another clipping is given.
"""

from typing import TYPE_CHECKING

from omniq.calibration.settings import GramStage, TokenWeights
from omniq.quantizers.clipping import RangeEstimator

if TYPE_CHECKING:  # settings are parsed without torch
    from omniq.calibration.module import BlockModule
    from omniq.calibration.task import BlockTask


class GPTQ(GramStage):
    """GPTQ on a fixed grid.

    Args:
        clipping: how to choose the range of each group; searched by default.
        damping: the fraction of the mean diagonal of the Gram matrix to add to its diagonal (0.01 in the paper).
        act_order: quantize columns in descending order of the mean square of their input.
        true_sequential: gather the inputs of a group of linears after the earlier groups have been quantized.
        batch_size: samples per gathering step.
        token_weights: the weight of each token in the Gram matrix; ``uniform`` as published.
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

    def module(self, task: "BlockTask") -> "BlockModule":
        from omniq.stages.modules.gptq import GPTQModule

        return GPTQModule(task, self)
