# SPDX-License-Identifier: Apache-2.0
"""The large product of a sweep, ``G = S_b D``: by the library, or in float32 on tensor cores from pairs of float16.

On a GPU a float32 product costs many times a float16 product, which tensor cores compute with sums in float32. A
float16 has 11 bits, so a float32 is nearly the sum of two, and a product of such sums is three products and a remainder
of 2^-22:

    S = r (S' + S"),   D = u (D' + D"),   S D ~ r u (S' D' + S' D" + S" D')

``r`` is a power of two for each row of S, and ``u`` one for each output feature. Both keep the factors in the range of
float16: ``|S_jk| <= sqrt(S_jj max S_kk)``, and D is measured in sixteenths of the row's largest grid step, so that a
float16 reaches 4096 steps, or in a larger unit where weights lie beyond half of that. The error is 2 to 4 times that of
the library's float32 (tests/kernels/test_products.py), and both are negligible beside TF32's.

**D' and D" need no extra memory.** A row of D, ``o`` numbers of four bytes, becomes a row of D' and one of D" in the
same memory, so that each of them is a matrix whose rows lie ``2 o`` apart. Its rows are joined again only while their
block of columns is swept. A block of S is split anew for each product, which is as cheap as reading it.

Shapes: ``o`` output features, ``i`` input features, ``n`` columns of a block.
"""

from typing import Protocol

import torch
from torch import Tensor

from omniq.kernels.fused import implementation
from omniq.kernels.layer_problem import Problem

_RANGE = 2.0**12  # largest entry of a row of S: an entry 2^26 times smaller still has a bit in S'
_SMALLEST = 2.0**-60  # of a unit: it and its reciprocal are normal numbers
_WIDEST = 2**16  # output features: one program holds a row of D
_ALIGNED = 8  # numbers: float16 rows start at multiples of 16 bytes, as tensor cores require


class Products(Protocol):
    """The products of one sweep."""

    def gradient(self, columns: slice, out: Tensor) -> Tensor:
        """``S_b D`` for the columns of a block, ``[n, o]``, in ``out``. Afterwards D's rows ``columns`` may change."""

    def refresh(self, columns: slice) -> None:
        """Take over D's rows ``columns``, which have changed, for the next products."""

    def finish(self) -> None:
        """Restore D after the last product."""


class LibraryProducts:
    """One product of the library, in the precision that is set."""

    def __init__(self, problem: Problem, residual: Tensor) -> None:
        self.problem, self.residual = problem, residual

    def gradient(self, columns: slice, out: Tensor) -> Tensor:
        return torch.mm(self.problem.gram[columns], self.residual, out=out)

    def refresh(self, columns: slice) -> None:
        pass

    def finish(self) -> None:
        pass


class PairProducts:
    """Three products of float16. Triton splits S and D and joins D.

    Args:
        problem: the layer.
        residual: D, contiguous float32 ``[i, o]``; holds pairs until ``finish``.
    """

    def __init__(self, problem: Problem, residual: Tensor) -> None:
        self.kernels, self.problem, self.residual = implementation("products", fused=True), problem, residual
        width, outputs = residual.shape
        pairs = residual.view(torch.float16).view(width, 2, outputs)
        self.high, self.low = pairs[:, 0], pairs[:, 1]
        self.unit = residual_unit(problem)
        norm = problem.gram.diagonal().sqrt()
        self.row_unit = next_power_of_two(norm * norm.amax()) / _RANGE
        # Products with these powers of two are exact; quotients in Triton are not.
        self.per_unit, self.per_row = self.unit.reciprocal(), self.row_unit.reciprocal()
        self.halves = residual.new_empty(2, problem.block, width, dtype=torch.float16)  # S' and S" of a block
        self.refresh(slice(0, width))

    def gradient(self, columns: slice, out: Tensor) -> Tensor:
        high, low = self.halves[:, : columns.stop - columns.start]
        self.kernels.split_into_halves(self.problem.gram[columns], self.per_row[columns], high, low)
        torch.mm(high, self.high, out_dtype=torch.float32, out=out)
        torch.addmm(out, high, self.low, out_dtype=torch.float32, out=out)
        torch.addmm(out, low, self.high, out_dtype=torch.float32, out=out)
        self.kernels.join_rows_(self.residual[columns], self.unit, out, self.row_unit[columns])
        return out

    def refresh(self, columns: slice) -> None:
        self.kernels.split_rows_(self.residual[columns], self.per_unit)

    def finish(self) -> None:
        self.kernels.join_rows_(self.residual, self.unit)


def residual_unit(problem: Problem) -> Tensor:
    """The unit of D for each output feature, a power of two, ``[o]``."""
    farthest = torch.linalg.vector_norm(problem.target, torch.inf, dim=0)  # of weights that a narrow grid clips
    return next_power_of_two(torch.maximum(problem.scale.amax(0), farthest / 2048)) / 16


def next_power_of_two(values: Tensor) -> Tensor:
    """The smallest power of two above each value; never so small that its reciprocal is infinite."""
    _, exponent = torch.frexp(values.clamp_min(_SMALLEST))
    return torch.ldexp(torch.ones_like(values), exponent)


def products_of(problem: Problem, residual: Tensor, fused: bool) -> Products:
    """The fastest products for this layer.

    Args:
        problem: the layer.
        residual: D, contiguous ``[i, o]``.
        fused: whether Triton may be used.
    """
    width, outputs = residual.shape
    fits = width % _ALIGNED == outputs % _ALIGNED == 0 and outputs <= _WIDEST
    wanted = problem.precision == "float32" and residual.is_cuda and fused
    return PairProducts(problem, residual) if wanted and fits else LibraryProducts(problem, residual)
