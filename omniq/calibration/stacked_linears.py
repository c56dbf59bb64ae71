# SPDX-License-Identifier: Apache-2.0
"""The linears that share an input and a grid, stacked as one matrix.

``||(W - W^) X||^2`` is a sum over the rows of W, so a solver that minimises it for given X treats each row
independently. Linears with the same input are therefore stacked. Each of several processes solves a range of rows
(``select_rows(local_rows)``), and ``gather`` collects the results: the time is divided by the number of processes, and
the result does not change.

All linears of a stack have one grid. Linears that share an input but not a grid form several stacks with one Gram
matrix (``split_by_grid``).

Shapes: ``o`` output features of all stacked linears, ``i`` input features, ``G`` groups.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import accumulate

import torch
from torch import Tensor

from omniq.calibration.task import BlockTask
from omniq.distributed import collectives
from omniq.grid.affine import Grid
from omniq.kernels.layer_problem import all_finite
from omniq.storage.block_result import BlockResult, QuantizedLinear


def split_by_grid(names: tuple[str, ...], grids: Mapping[str, Grid]) -> list[tuple[str, ...]]:
    """Group linears by their grid; grids are in the order of their first occurrence."""
    found: dict[Grid, list[str]] = {}
    for name in names:
        found.setdefault(grids[name], []).append(name)
    return [tuple(together) for together in found.values()]


@dataclass
class StackedLinears:
    """Linears of one shared input and one grid as one matrix.

    Args:
        names: names of the linears, in order.
        rows: number of output features of each linear.
        weight: the stacked weights, float32 ``[o, i]``.
        grid: the grid of all linears.
        fitted: scale and zero point, each ``[o, G]``; None until they are chosen.
    """

    names: tuple[str, ...]
    rows: tuple[int, ...]
    weight: Tensor
    grid: Grid
    fitted: tuple[Tensor, Tensor] | None = None

    @classmethod
    def of(cls, task: BlockTask, names: tuple[str, ...]) -> "StackedLinears":
        """Stack the weights of these linears.

        Raises:
            UserError: a weight is not finite; names the linear.
            ValueError: the linears have different grids.
        """
        (grid,) = {task.grids[name] for name in names}
        weights = [task.linear(name).weight.detach().float() for name in names]
        stacked = torch.cat(weights)
        if not all_finite(stacked):
            name, bad = next((n, b) for n, w in zip(names, weights, strict=True) if (b := int((~w.isfinite()).sum())))
            raise collectives.error_on_rank0(
                f"{task.name} {name}: {bad} weights of the model are not finite: use an undamaged checkpoint, or set "
                "trainer.precision to 32-true if the values exceed the range of float16"
            )
        return cls(names, tuple(len(weight) for weight in weights), stacked, grid)

    def select_rows(self, rows: slice) -> "StackedLinears":
        """The stack restricted to a range of rows."""
        fitted = None if self.fitted is None else (self.fitted[0][rows], self.fitted[1][rows])
        return StackedLinears(self.names, self.lengths(rows), self.weight[rows], self.grid, fitted)

    def lengths(self, rows: slice) -> tuple[int, ...]:
        """Number of rows of each linear within a range of rows; may be 0."""
        ends = zip(self.rows, accumulate(self.rows), strict=True)
        return tuple(max(0, min(end, rows.stop) - max(end - n, rows.start)) for n, end in ends)

    @property
    def local_rows(self) -> slice:
        """The rows that this process solves."""
        return collectives.local_rows(sum(self.rows))

    def gather(self, share: Tensor) -> Tensor:
        """Concatenate the rows of all processes, ``[o, …]``; each process gives its share."""
        return collectives.all_gather_rows(share, sum(self.rows))

    def split(self, stacked: Tensor) -> Iterator[tuple[str, Tensor]]:
        """Split a stacked tensor ``[o, …]`` into the rows of each linear, with the name of the linear."""
        yield from zip(self.names, stacked.split(self.rows), strict=True)

    @property
    def scale(self) -> Tensor:
        """Scales, ``[o, G]``."""
        return self._chosen()[0]

    @property
    def zero_point(self) -> Tensor:
        """Zero points, ``[o, G]``."""
        return self._chosen()[1]

    def _chosen(self) -> tuple[Tensor, Tensor]:
        if self.fitted is None:
            raise RuntimeError(f"the scales of {', '.join(self.names)} have not been chosen yet")
        return self.fitted

    def linears(self, codes: Tensor) -> dict[str, QuantizedLinear]:
        """Build the finished linears from codes ``[o, i]``."""
        parts = zip(self.split(codes), self.scale.split(self.rows), self.zero_point.split(self.rows), strict=True)
        return {name: QuantizedLinear.of(self.grid, part, scale, zero) for (name, part), scale, zero in parts}

    def fit_from(self, result: BlockResult) -> None:
        """Use the scales and zero points of an earlier stage."""
        linears = [result.linears[name] for name in self.names]
        scale, zero_point = (torch.cat([getattr(x, part) for x in linears]) for part in ("scale", "zero_point"))
        self.fitted = scale.to(self.weight), zero_point.to(self.weight)

    def values_from(self, result: BlockResult) -> Tensor:
        """Dequantized weights of an earlier stage, float32 ``[o, i]``; its grid may differ from the current one."""
        return torch.cat([result.linears[name].dequantize(device=self.weight.device) for name in self.names])
