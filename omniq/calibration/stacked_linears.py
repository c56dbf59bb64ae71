# SPDX-License-Identifier: Apache-2.0
"""The linears of one shared input as one matrix, whole or the rows of one process.

``||(W - W^) X||^2`` is a sum over the rows of W, and a solver that minimises it for given X treats each of them alone.
So linears with the same input are stacked, and several processes solve a run of rows each (``part(my_rows)``) and
``gather`` what they found: the time divides by their number, and nothing else changes.

All linears of a stack have one grid. Linears that share an input but not a grid make several stacks with one Gram
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
    """These linears, those on one grid together; grids in the order in which they first occur."""
    found: dict[Grid, list[str]] = {}
    for name in names:
        found.setdefault(grids[name], []).append(name)
    return [tuple(together) for together in found.values()]


@dataclass
class StackedLinears:
    """Linears of one shared input and one grid as one matrix.

    Args:
        names: of the linears, in order.
        rows: output features of each.
        weight: float32 ``[o, i]``.
        grid: of all of them.
        fitted: scale and zero point, each ``[o, G]``, once they are chosen.
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
            UserError: some are not finite; names the linear.
            ValueError: they have several grids.
        """
        (grid,) = {task.grids[name] for name in names}
        weights = [task.linear(name).weight.detach().float() for name in names]
        stacked = torch.cat(weights)
        if not all_finite(stacked):
            name, bad = next((n, b) for n, w in zip(names, weights, strict=True) if (b := int((~w.isfinite()).sum())))
            raise collectives.error_on_rank0(
                f"{task.name} {name}: {bad} weights of the model are not finite: use a checkpoint that is whole, or "
                "trainer.precision 32-true if its values are beyond float16"
            )
        return cls(names, tuple(len(weight) for weight in weights), stacked, grid)

    def part(self, rows: slice) -> "StackedLinears":
        """Some neighbouring rows of the stack."""
        fitted = None if self.fitted is None else (self.fitted[0][rows], self.fitted[1][rows])
        return StackedLinears(self.names, self.lengths(rows), self.weight[rows], self.grid, fitted)

    def lengths(self, rows: slice) -> tuple[int, ...]:
        """How many rows of each linear are among these: none of some, perhaps."""
        ends = zip(self.rows, accumulate(self.rows), strict=True)
        return tuple(max(0, min(end, rows.stop) - max(end - n, rows.start)) for n, end in ends)

    @property
    def my_rows(self) -> slice:
        """The rows that are this process' share."""
        return collectives.local_rows(sum(self.rows))

    def gather(self, share: Tensor) -> Tensor:
        """All rows of something, ``[o, …]``, of what each process has for its share."""
        return collectives.all_gather_rows(share, sum(self.rows))

    def split(self, stacked: Tensor) -> Iterator[tuple[str, Tensor]]:
        """Rows of each linear of something ``[o, …]``."""
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
            raise RuntimeError(f"scales of {', '.join(self.names)} have not been chosen")
        return self.fitted

    def linears(self, codes: Tensor) -> dict[str, QuantizedLinear]:
        """The finished linears, from codes ``[o, i]``."""
        parts = zip(self.split(codes), self.scale.split(self.rows), self.zero_point.split(self.rows), strict=True)
        return {name: QuantizedLinear.of(self.grid, part, scale, zero) for (name, part), scale, zero in parts}

    def fit_from(self, result: BlockResult) -> None:
        """Take scales and zero points of an earlier stage."""
        linears = [result.linears[name] for name in self.names]
        scale, zero_point = (torch.cat([getattr(x, part) for x in linears]) for part in ("scale", "zero_point"))
        self.fitted = scale.to(self.weight), zero_point.to(self.weight)

    def values_from(self, result: BlockResult) -> Tensor:
        """Weights that an earlier stage has left, float32 ``[o, i]``: on its grid, which may be another."""
        return torch.cat([result.linears[name].dequantize(device=self.weight.device) for name in self.names])
