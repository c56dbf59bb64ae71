# SPDX-License-Identifier: Apache-2.0
"""Split float32 matrices into pairs of float16 and join them: the kernels of ``omniq.kernels.products``.

``x = u (h + l)``: h is the float16 nearest to ``x / u``, and l the float16 nearest to the remainder. The product with a
power of two is exact, and so is the sum of both in float32.

A row of ``o`` float32 and its pair, h before l, occupy the same memory in turn. One program holds a whole row in
registers, and a barrier keeps its loads before its stores. These kernels have no torch implementation: on a CPU, and
where float16 pairs do not fit, ``omniq.kernels.products`` uses the library's product.

Import this module only where Triton exists.

Shapes: ``o`` output features, ``i`` input features, ``n`` rows.
"""
# mypy: allow-untyped-defs

import torch
import triton
import triton.language as tl
from torch import Tensor

_PART = 1024  # numbers of a row of S in a program


@triton.jit
def _split_into_halves(source_ptr, per_unit_ptr, high_ptr, low_ptr, width, stride, PART: tl.constexpr):
    row = tl.program_id(0)
    column = tl.program_id(1) * PART + tl.arange(0, PART)
    valid = column < width
    x = tl.load(source_ptr + row.to(tl.int64) * stride + column, mask=valid, other=0.0) * tl.load(per_unit_ptr + row)
    high = x.to(tl.float16)
    offset = row.to(tl.int64) * width + column
    tl.store(high_ptr + offset, high, mask=valid)
    tl.store(low_ptr + offset, (x - high.to(tl.float32)).to(tl.float16), mask=valid)


@triton.jit
def _split_rows(rows_ptr, pairs_ptr, per_unit_ptr, outputs, WIDE: tl.constexpr):
    start = tl.program_id(0).to(tl.int64) * outputs
    column = tl.arange(0, WIDE)
    valid = column < outputs
    per_unit = tl.load(per_unit_ptr + column, mask=valid, other=1.0)
    x = tl.load(rows_ptr + start + column, mask=valid, other=0.0) * per_unit
    high = x.to(tl.float16)
    low = (x - high.to(tl.float32)).to(tl.float16)
    tl.debug_barrier()
    tl.store(pairs_ptr + 2 * start + column, high, mask=valid)
    tl.store(pairs_ptr + 2 * start + outputs + column, low, mask=valid)


@triton.jit
def _join_rows(
    rows_ptr, pairs_ptr, unit_ptr, product_ptr, factor_ptr, outputs, PRODUCT: tl.constexpr, WIDE: tl.constexpr
):
    row = tl.program_id(0).to(tl.int64)
    start = row * outputs
    column = tl.arange(0, WIDE)
    valid = column < outputs
    high = tl.load(pairs_ptr + 2 * start + column, mask=valid, other=0.0)
    low = tl.load(pairs_ptr + 2 * start + outputs + column, mask=valid, other=0.0)
    tl.debug_barrier()
    unit = tl.load(unit_ptr + column, mask=valid, other=1.0)
    tl.store(rows_ptr + start + column, (high.to(tl.float32) + low.to(tl.float32)) * unit, mask=valid)
    if PRODUCT:
        product = tl.load(product_ptr + start + column, mask=valid, other=0.0)
        tl.store(product_ptr + start + column, product * tl.load(factor_ptr + row) * unit, mask=valid)


def split_into_halves(source: Tensor, per_unit: Tensor, high: Tensor, low: Tensor) -> None:
    """``source = unit (high + low)``.

    Args:
        source: float32 ``[n, i]``, rows at any stride.
        per_unit: ``1 / unit``, powers of two, ``[n]``.
        high, low: float16 ``[n, i]``, contiguous; written to.
    """
    rows, width = source.shape
    _split_into_halves[(rows, triton.cdiv(width, _PART))](
        source, per_unit, high, low, width, source.stride(0), PART=_PART, num_warps=4
    )


def split_rows_(rows: Tensor, per_unit: Tensor) -> None:
    """Turn rows of D into pairs.

    Args:
        rows: float32 ``[n, o]``, contiguous; overwritten with ``[n, 2, o]`` float16.
        per_unit: ``1 / unit``, powers of two, ``[o]``.
    """
    outputs = rows.shape[1]
    _split_rows[(len(rows),)](rows, rows.view(torch.float16), per_unit, outputs, **_row_launch(outputs))


def join_rows_(rows: Tensor, unit: Tensor, product: Tensor | None = None, factor: Tensor | None = None) -> None:
    """Turn pairs back into rows of D, and multiply a product of pairs by its units.

    Args:
        rows: as ``split_rows_`` leaves them; overwritten with float32 ``[n, o]``.
        unit: powers of two, ``[o]``.
        product: float32 ``[n, o]``, contiguous; multiplied by ``factor`` ``[n]`` and ``unit``.
    """
    outputs = rows.shape[1]
    _join_rows[(len(rows),)](
        rows, rows.view(torch.float16), unit, rows if product is None else product, unit if factor is None else factor,
        outputs, PRODUCT=product is not None, **_row_launch(outputs),
    )  # fmt: skip


def _row_launch(outputs: int) -> dict[str, int]:
    wide = triton.next_power_of_2(outputs)
    return {"WIDE": wide, "num_warps": min(32, max(4, wide // 1024))}  # 32 numbers a thread; more beyond 32768
