# SPDX-License-Identifier: Apache-2.0
"""QuantEase with a sparse part that changes (arXiv 2309.01885, Algorithm 3): descent and hard thresholding.

    minimise  ||(W - B - H) X||^2,   B on the grid,   H sparse

**Steps** of one iteration:

1. one sweep over B with target ``W - H``;
2. one step of iterative hard thresholding on H with B fixed (``omniq.solvers.outliers.threshold_step``).

In terms of the residual ``D = W - B - H`` the sweep is the usual one, and step 2 changes the target and D together. The
support belongs to a whole linear, so its rows are not independent: the best iterate of a linear is that of its smallest
total error. Stacked linears share the sweep only. Each has its own support, as if it were solved alone.

**Deviations.** The published code makes step 2 half as long, and never rounds B.

Shapes: ``o`` output features, ``i`` input features, ``G`` groups.
"""

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from omniq.grid.affine import Grid
from omniq.kernels.layer_problem import Problem, objective, squares
from omniq.kernels.matmul_precision import matmul_precision
from omniq.solvers.coordinate_descent import CoordinateDescent
from omniq.solvers.outliers import largest_eigenvalue, threshold_step
from omniq.solvers.solution import LayerSolution


class AlternatingDescent(CoordinateDescent):
    """Algorithm 3 on one stacked weight.

    Args:
        params: one parameter ``[o, i]`` that holds the original weights W; it becomes W - H.
        gram, grid, scale, zero_point: as for ``CoordinateDescent``; the range of the grid ignores the support.
        support: where H starts, bool ``[o, i]``, from ``omniq.solvers.outliers.choose_support``; H starts as W there.
        rows: output features of each stacked linear, which keeps as many entries (or columns) as its support has.
        structured: the support of each linear is whole columns.
        settings: the other settings of ``CoordinateDescent``, except target and mask.
    """

    def __init__(
        self,
        params: Iterable[nn.Parameter],
        gram: Tensor,
        grid: Grid,
        scale: Tensor,
        zero_point: Tensor,
        *,
        support: Tensor,
        rows: Sequence[int],
        structured: bool = False,
        **settings: Any,
    ) -> None:
        (weight,) = params = list(params)
        target = weight.data.t().contiguous()
        sparse = torch.where(support.t(), target, 0).contiguous()  # [i, o]
        weight.data = (target - sparse).t()  # changes with H, so it needs its own memory
        super().__init__(params, gram, grid, scale, zero_point, **settings)
        counts = [int(part[0].sum() if structured else part.sum()) for part in support.split(list(rows))]
        self.param_groups[0] |= {"structured": structured, "parts": list(rows), "counts": counts}
        state, problem = self.state[self.weight], self.problem
        ridge = state["ridge"] * squares(target)
        state |= {
            "sparse": sparse,
            "best_sparse": sparse.clone(),
            "lambda_max": largest_eigenvalue(problem.gram),
            "baseline": objective(problem, target) - ridge,
        }

    def _after_sweep(self, problem: Problem, sweep: int) -> None:
        super()._after_sweep(problem, sweep)
        state, group, problem = self.state[self.weight], self.param_groups[0], self.problem
        parts = zip(
            state["residual"].t().split(group["parts"]),
            state["sparse"].t().split(group["parts"]),
            group["counts"],
            strict=True,
        )
        with matmul_precision(group["precision"], problem.gram.device):
            steps = [
                threshold_step(residual, sparse, problem.gram, count, state["lambda_max"], group["structured"])
                for residual, sparse, count in parts
            ]
        moved = torch.cat(steps).t()
        change = moved - state["sparse"]
        state["sparse"] = moved.contiguous()
        problem.target.sub_(change)  # W - H
        state["residual"].sub_(change)
        if problem.dead:
            state["residual"].mul_((problem.inverse > 0).to(change.dtype)[:, None])
        state["objective"] = objective(problem, state["residual"])

    def _improved(self) -> Tensor:
        state, parts = self.state[self.weight], self.param_groups[0]["parts"]
        pairs = zip(state["objective"].split(parts), state["best_objective"].split(parts), strict=True)
        return torch.cat([(now.sum() < best.sum()).expand_as(now) for now, best in pairs])

    def _keep_best(self) -> None:
        state = self.state[self.weight]
        state["best_sparse"] = torch.where(self._improved(), state["sparse"], state["best_sparse"])
        super()._keep_best()

    def result(self, last: bool = False) -> LayerSolution:
        """The best codes and their H."""
        solution = super().result(last)
        return solution._replace(sparse=self.state[self.weight]["best_sparse"].t())
