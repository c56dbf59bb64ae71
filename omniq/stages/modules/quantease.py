# SPDX-License-Identifier: Apache-2.0
"""``QuantEaseModule``; the equations are in ``omniq.stages.quantease``.

Shapes: ``o`` output features, ``i`` input features.
"""

from typing import Any

import torch
from torch import Tensor, nn

from omniq.calibration.gram import GramModule
from omniq.calibration.outlier_settings import OutlierSettings
from omniq.calibration.stacked_linears import StackedLinears
from omniq.calibration.task import BlockTask
from omniq.distributed import collectives
from omniq.grid.affine import Grid
from omniq.kernels.layer_problem import groups_of
from omniq.solvers.alternating_descent import AlternatingDescent
from omniq.solvers.coordinate_descent import CoordinateDescent
from omniq.solvers.gptq import gptq
from omniq.solvers.outliers import choose_support
from omniq.solvers.solution import LayerSolution
from omniq.stages.quantease import QuantEase
from omniq.storage.block_result import Outliers, QuantizedLinear


class QuantEaseModule(GramModule):
    """Coordinate descent on one block: a solver step is one sweep of the optimizer of each stack."""

    settings: QuantEase

    def __init__(self, task: BlockTask, settings: QuantEase) -> None:
        super().__init__(task, settings, work=settings.sweeps)
        self.optimizers_of: dict[int, CoordinateDescent] = {}
        self.orders: dict[int, Tensor | None] = {}
        self._saved: dict[int, Any] = {}

    def solve(self, number: int, stack: StackedLinears, gram: Tensor, step: int) -> dict[str, QuantizedLinear] | None:
        if number not in self.optimizers_of:
            k, opening = self.plan[number][0], self._reopen if number in self._saved else self._open
            last = number == self.stacks_in(k)[-1]
            own = gram if last else gram.clone()  # an optimizer damps its Gram matrix in place
            optimizer = self.optimizers_of[number] = opening(number, stack, own)
            # The optimizer holds its own weights and the damped, reordered Gram matrix: free the copies.
            stack.weight, self.grams[k] = stack.weight.new_empty(0), optimizer.problem.gram if last else gram
        optimizer = self.optimizers_of[number]
        # Rows in all processes stop together, so that each row has the same sweeps as in one process.
        if optimizer.must_continue or not collectives.all_ranks(optimizer.converged):
            optimizer.step()
        powers = optimizer.state[optimizer.weight]["baseline"]
        self.track_errors(stack, self._rows(stack), optimizer.row_errors(), powers)
        return None if step + 1 < self.work else self._finished(number, stack)

    def _finished(self, number: int, stack: StackedLinears) -> dict[str, QuantizedLinear]:
        """The solution of one stack, gathered from the optimizers of all processes."""
        solution, order = self.optimizers_of.pop(number).result(last=True), self.orders.pop(number)
        back = slice(None) if order is None else order.argsort()
        if self._shared:
            solution = LayerSolution._make(None if part is None else stack.gather(part) for part in solution)
        stack.fitted = solution.scale, solution.zero_point
        found = stack.linears(solution.codes[:, back])
        if solution.sparse is None:
            return found
        return {
            name: QuantizedLinear.of(x.grid, x.codes, x.scale, x.zero_point, Outliers.from_dense(dense))
            for (name, dense), x in zip(stack.split(solution.sparse[:, back]), found.values(), strict=True)
        }

    @property
    def _shared(self) -> bool:
        """True if each process solves a share of the rows; Algorithm 3 moves the support across rows and needs all."""
        return not self.settings.algorithm3

    def _rows(self, stack: StackedLinears) -> slice:
        """The rows that this process solves."""
        return stack.local_rows if self._shared else slice(0, sum(stack.rows))

    def _open(self, number: int, stack: StackedLinears, gram: Tensor) -> CoordinateDescent:
        """Choose support, scales, start and column order of one stack, and set up its optimizer."""
        settings, previous, rows = self.settings, self.task.result, self._rows(stack)
        mask = None if settings.outliers is None else self._support(stack, gram, settings.outliers)[rows]
        if settings.grid != "clipping" and previous is not None:
            stack.fit_from(previous)
        part = stack.select_rows(rows)
        if part.fitted is None:
            free = part.weight if mask is None else part.weight.masked_fill(mask, 0)
            lo, hi = settings.clipping.range(free, part.grid, self.second_moment(number))
            part.fitted = part.grid.fit(lo, hi)
        start, weight = self._start(part, gram, mask, rows), part.weight
        group_index = groups_of(weight, part.scale)
        self.orders[number] = order = (
            gram.diagonal().argsort(descending=True, stable=True) if settings.act_order else None
        )
        if order is not None:
            gram, weight, group_index = gram[order][:, order], weight[:, order], group_index[order]
            mask, start = (None if each is None else each[:, order] for each in (mask, start))
        fitted = part.scale, part.zero_point
        return self._optimizer(weight, gram, part.grid, fitted, group_index, mask, start, settings.damping, part.rows)

    def _optimizer(
        self,
        weight: Tensor,
        gram: Tensor,
        grid: Grid,
        fitted: tuple[Tensor, Tensor],
        group_index: Tensor,
        mask: Tensor | None,
        start: Tensor | None,
        damping: float,
        rows: tuple[int, ...],
    ) -> CoordinateDescent:
        settings = self.settings
        common: dict[str, Any] = {
            "sweeps": settings.sweeps,
            "group_index": group_index,
            "damping": damping,
            "refit_scales": settings.refit_scales,
            "precision": settings.precision,
        }
        dtype = torch.float64 if settings.precision == "float64" else torch.float32
        parameter = nn.Parameter((weight if start is None else start).to(dtype), requires_grad=False)
        outliers = settings.outliers
        if mask is not None and outliers is not None and outliers.method == "algorithm3":
            common |= {"support": mask, "structured": outliers.columns, "rows": rows}
            return AlternatingDescent([parameter], gram, grid, *fitted, **common)
        target = None if start is None else weight
        return CoordinateDescent([parameter], gram, grid, *fitted, target=target, mask=mask, **common)

    def _support(self, stack: StackedLinears, gram: Tensor, outliers: OutlierSettings) -> Tensor:
        """Mask of the weights to keep in float16, bool ``[o, i]``: the same fraction of each linear."""
        chosen = [
            choose_support(
                part,
                outliers.fraction,
                by=outliers.support,
                structured=outliers.columns,
                second_moment=gram.diagonal(),
                grid=stack.grid,
            )
            for _, part in stack.split(stack.weight)
        ]
        return torch.cat(chosen)

    def _start(self, part: StackedLinears, gram: Tensor, mask: Tensor | None, rows: slice) -> Tensor | None:
        """Initial weights of some rows, ``[o, i]``; None to start from the original weights."""
        settings, grid = self.settings, part.grid
        if settings.start == "weights":
            return None
        if settings.start == "gptq":
            start = gptq(
                part.weight, gram, part.scale, part.zero_point, grid.bits,
                damping=max(settings.damping, 0.01), act_order=settings.act_order, mask=mask,
            )  # fmt: skip
            return start.values()
        previous = self.task.result
        if settings.start == "previous" and previous is not None:
            values = part.values_from(previous)[rows]
        else:
            codes = grid.quantize(part.weight, part.scale, part.zero_point)
            values = grid.dequantize(codes, part.scale, part.zero_point)
        return values if mask is None else torch.where(mask, part.weight, values)

    def solver_state(self) -> dict[int, Any]:
        return {number: {"order": self.orders[number], **o.state_dict()} for number, o in self.optimizers_of.items()}

    def load_solver_state(self, state: dict[int, Any]) -> None:
        self._saved = state
        # The Gram matrix is saved only once, in the state of the optimizer.
        for number, saved in state.items():
            self.grams[self.plan[number][0]] = saved["state"][0]["gram"].to(self.task.device)

    def _reopen(self, number: int, stack: StackedLinears, gram: Tensor) -> CoordinateDescent:
        """Set up the optimizer of an unfinished stack and restore its state."""
        saved = self._saved.pop(number)
        state = {name: value.to(gram.device) for name, value in saved["state"][0].items()}
        self.orders[number] = order = None if saved["order"] is None else saved["order"].to(gram.device)
        support = state["sparse"] != 0 if "sparse" in state else state.get("mask")
        mask = None if support is None else support.t()
        weight = stack.weight if order is None else stack.weight[:, order]
        fitted = state["scale"].t(), state["zero_point"].t()
        # No damping: the saved Gram matrix is already damped.
        optimizer = self._optimizer(
            weight, gram, stack.grid, fitted, state["group_index"], mask, None, damping=0.0, rows=stack.rows
        )
        optimizer.load_state_dict(saved)
        return optimizer
