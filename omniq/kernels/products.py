# SPDX-License-Identifier: Apache-2.0
"""The large product of a sweep, ``G = S_b D``: by the library, or in float32 on tensor cores, from pairs of float16.

On a GPU a float32 product costs many times one of float16, which tensor cores take and add up in float32. A float16
has 11 bits, so a float32 is next to the sum of two, and a product of such sums is three products and a rest of 2^-22:

    S = r (S' + S"),   D = u (D' + D"),   S D ~ r u (S' D' + S' D" + S" D')

with one power of two ``r`` for each row of S and one ``u`` for each output feature, which keep both in the range of
float16: ``|S_jk| <= sqrt(S_jj max S_kk)``, and D is counted in sixteenths of the row's largest step of the grid, so
that a float16 reaches 4096 steps, or in more where weights lie farther out than half of that. The error is 2 to 4 times
that of the library's float32 (tests/kernels/test_products.py), and both are next to nothing beside TF32's.

**No room is needed for D' and D"**: a row of D, ``o`` numbers of four bytes, becomes a row of D' and one of D" in the
same memory, so that each of them is a matrix whose rows lie ``2 o`` apart. Only while a block of columns is swept are
its rows joined again. A block of S is taken apart anew each time it is needed: that is as cheap as reading it.

Shapes: ``o`` output features, ``i`` input features, ``n`` columns of a block.
"""

from typing import Protocol

import torch
from torch import Tensor

from omniq.kernels.layer_problem import Problem

_RANGE = 2.0**12  # to which a row of S reaches at most: what is 2^26 times smaller still has a bit in S'
_SMALLEST = 2.0**-60  # unit's: it and its reciprocal are normal numbers
_WIDEST = 2**16  # output features: one program holds a row of D
_ALIGNED = 8  # numbers: rows of float16 that begin at 16 bytes, as tensor cores want them


class Products(Protocol):
    """The products of one sweep."""

    def gradient(self, columns: slice, out: Tensor) -> Tensor:
        """``S_b D`` for the columns of a block, ``[n, o]``, in ``out``; from then on D's rows there may be changed."""

    def close(self, columns: slice) -> None:
        """These rows of D have been changed, and are next needed in a product."""

    def finish(self) -> None:
        """No product follows."""


class Library:
    """One product of the library, in the precision that it is set to."""

    def __init__(self, problem: Problem, residual: Tensor) -> None:
        self.problem, self.residual = problem, residual

    def gradient(self, columns: slice, out: Tensor) -> Tensor:
        return torch.mm(self.problem.gram[columns], self.residual, out=out)

    def close(self, columns: slice) -> None:
        pass

    def finish(self) -> None:
        pass


class Pairs:
    """Three products of float16; Triton takes S and D apart and puts D together.

    Args:
        residual: D, contiguous float32 ``[i, o]``; holds pairs until ``finish``.
    """

    def __init__(self, problem: Problem, residual: Tensor) -> None:
        from omniq.kernels import products_triton

        self.kernels, self.problem, self.residual = products_triton, problem, residual
        width, outputs = residual.shape
        pairs = residual.view(torch.float16).view(width, 2, outputs)
        self.high, self.low = pairs[:, 0], pairs[:, 1]
        self.unit = unit_of(problem)
        norm = problem.gram.diagonal().sqrt()
        self.row_unit = power_of_two(norm * norm.amax()) / _RANGE
        self.per_unit, self.per_row = (
            self.unit.reciprocal(),
            self.row_unit.reciprocal(),
        )  # products are exact, quotients of Triton not
        self.parts = residual.new_empty(2, problem.block, width, dtype=torch.float16)  # S' and S" of a block
        self.close(slice(0, width))

    def gradient(self, columns: slice, out: Tensor) -> Tensor:
        high, low = self.parts[:, : columns.stop - columns.start]
        self.kernels.take_apart(self.problem.gram[columns], self.per_row[columns], high, low)
        torch.mm(high, self.high, out_dtype=torch.float32, out=out)
        torch.addmm(out, high, self.low, out_dtype=torch.float32, out=out)
        torch.addmm(out, low, self.high, out_dtype=torch.float32, out=out)
        self.kernels.join_(self.residual[columns], self.unit, out, self.row_unit[columns])
        return out

    def close(self, columns: slice) -> None:
        self.kernels.split_(self.residual[columns], self.per_unit)

    def finish(self) -> None:
        self.kernels.join_(self.residual, self.unit)


def unit_of(problem: Problem) -> Tensor:
    """What D is counted in, for each output feature a power of two, ``[o]``."""
    farthest = torch.linalg.vector_norm(problem.target, torch.inf, dim=0)  # of weights that a narrow grid clips
    return power_of_two(torch.maximum(problem.scale.amax(0), farthest / 2048)) / 16


def power_of_two(values: Tensor) -> Tensor:
    """The least power of two above each of some numbers, and at least one whose reciprocal is finite."""
    _, exponent = torch.frexp(values.clamp_min(_SMALLEST))
    return torch.ldexp(torch.ones_like(values), exponent)


def products_of(problem: Problem, residual: Tensor, fused: bool) -> Products:
    """The fastest there is.

    Args:
        residual: D, contiguous ``[i, o]``.
        fused: whether Triton may be used.
    """
    width, outputs = residual.shape
    fits = width % _ALIGNED == outputs % _ALIGNED == 0 and outputs <= _WIDEST
    wanted = problem.precision == "float32" and residual.is_cuda and fused
    return Pairs(problem, residual) if wanted and fits else Library(problem, residual)
