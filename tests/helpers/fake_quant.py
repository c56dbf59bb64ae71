# SPDX-License-Identifier: Apache-2.0
"""Float64 reference of fake quantization with learned clipping, random problems, and comparisons.

Shapes: ``o`` output features, ``i`` input features, ``G`` groups in a row.
"""

import itertools
from collections.abc import Callable

import torch
from torch import Tensor

from omniq.grid.affine import Grid
from omniq.kernels.fake_quant import fake_quantize, fake_quantize_reference
from omniq.kernels.scaled_weight import ScaledWeight

# Relative error of w / s in float32, doubled: sigmoid 10 u, range, scale and quotient 5 u, with u = 2^-24.
TIE = 2.0**-19


def straight_through(value: Tensor, rounded: Tensor) -> Tensor:
    return value + (rounded - value).detach()


def paper(w: Tensor, lo: Tensor, hi: Tensor, up: Tensor, low: Tensor, bits: int, symmetric: bool) -> Tensor:
    """Fake quantization as the paper writes it, group by group, in float64."""
    o, i, G = *w.shape, lo.shape[1]
    rows = []
    for r in range(o):
        for k in range(G):
            group = w[r, k * (i // G) : (k + 1) * (i // G)]
            biggest = hi[r, k] / (1 + torch.exp(-up[r, k]))
            smallest = lo[r, k] / (1 + torch.exp(-low[r, k]))
            span = 2 * torch.maximum(biggest, -smallest) if symmetric else biggest - smallest
            step = torch.clamp(span / (2**bits - 1), min=torch.finfo(torch.float64).tiny)
            zero = 2 ** (bits - 1) if symmetric else torch.round(-smallest / step).item()
            n = group / step
            code = torch.clip(straight_through(n, torch.round(n)) + zero, 0, 2**bits - 1)
            rows.append((code - zero) * step)
    return torch.cat(rows).view(o, i)


def fused_on(w: Tensor, lo: Tensor, hi: Tensor, up: Tensor, low: Tensor, grid: Grid) -> Tensor:
    """The operator on a given range, with the arguments in the order of ``random_problem``."""
    return fake_quantize(w, up, low, grid, (lo, hi))


def reference_on(w: Tensor, lo: Tensor, hi: Tensor, up: Tensor, low: Tensor, grid: Grid) -> Tensor:
    """The specification on a given range, likewise."""
    return fake_quantize_reference(w, up, low, grid, (lo, hi))


def fused_scaled(
    grid: Grid, w: Tensor, rows: Tensor | None, columns: Tensor | None, upper: Tensor, lower: Tensor
) -> Tensor:
    """The operator on a weight with factors."""
    return fake_quantize(ScaledWeight(w, rows, columns), upper, lower, grid)


def random_problem(
    o: int, i: int, grid: Grid, seed: int = 0, spread: float = 1.0, kind: str = "normal"
) -> list[Tensor]:
    """Weight ``[o, i]``, range and logits ``[o, G]`` in float64; ``spread`` is that of the logits around 1."""
    draw = torch.Generator().manual_seed(seed)
    w = torch.randn(o, i, generator=draw, dtype=torch.float64) * 0.02
    if kind == "positive":
        w = w.abs()
    if kind == "negative":
        w = -w.abs()
    if kind == "zero":
        w[0] = 0
    lo, hi = grid.range(w)
    up, low = (1 + spread * torch.randn(lo.shape, generator=draw, dtype=torch.float64) for _ in range(2))
    return [w, lo, hi, up, low]


def gradients(
    function: Callable[..., Tensor], tensors: list[Tensor], grad: Tensor, *args: object
) -> tuple[Tensor, list[Tensor]]:
    """Result of a function, and its gradients for the tensors."""
    leaves = [t.detach().clone().requires_grad_() for t in tensors]
    out = function(*leaves, *args)
    return out.detach(), list(torch.autograd.grad(out, leaves, grad.to(out.dtype), allow_unused=True))


def relative(a: Tensor, b: Tensor) -> float:
    """Norm of the difference relative to the norm of ``b``."""
    return ((a.double() - b.double()).norm() / b.double().norm().clamp(min=1e-300)).item()


def count_wrong(
    out: Tensor, w: Tensor, lo: Tensor, hi: Tensor, up: Tensor, low: Tensor, bits: int, symmetric: bool
) -> int:
    """Count the values that differ from float64's, rounded to their dtype.

    Where ``w / s`` or ``-xmin / s`` is so near to a tie that a relative change of ``TIE`` crosses it, both codes are
    right.
    """
    max_code = 2**bits - 1
    n = w.unflatten(1, (lo.shape[1], -1))
    biggest, smallest = (hi * up.sigmoid())[..., None], (lo * low.sigmoid())[..., None]
    step = (2 * torch.maximum(biggest, -smallest) if symmetric else biggest - smallest) / max_code
    wrong = torch.ones(out.shape, dtype=torch.bool)
    for of_zero, of_code in itertools.product((1 - TIE, 1 + TIE), repeat=2):
        zero = torch.full_like(step, 2 ** (bits - 1)) if symmetric else (-smallest / step * of_zero).round()
        code = ((n / step * of_code).round() + zero).clamp(0, max_code)
        right = ((code - zero) * step).flatten(1)
        ulp = torch.finfo(out.dtype).eps / 2 + TIE
        wrong &= (out.double() - right).abs() > ulp * right.abs() + 1e-7  # float16 is subnormal below 6e-5
    return int(wrong.sum())


def random_factors(o: int, i: int, by_row: bool, by_column: bool, seed: int = 0) -> list[Tensor | None]:
    """Positive factors of rows ``[o]`` and columns ``[i]`` in float64, or None."""
    draw = torch.Generator().manual_seed(seed)
    rows, columns = (torch.randn(size, generator=draw, dtype=torch.float64).exp() for size in (o, i))
    return [rows if by_row else None, columns if by_column else None]


def scaled(w: Tensor, rows: Tensor | None, columns: Tensor | None) -> Tensor:
    """``diag(rows) w diag(columns)``."""
    w = w if columns is None else w * columns
    return w if rows is None else w * rows[:, None]
