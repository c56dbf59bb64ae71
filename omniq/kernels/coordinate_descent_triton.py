# SPDX-License-Identifier: Apache-2.0
"""The sequential part of a coordinate descent sweep in one Triton kernel per block of columns.

The same step 2 as ``omniq.kernels.coordinate_descent.round_block``, fused: one program owns 32 rows of the layer for all
columns of a block, and rows are independent, so programs never meet. A block is walked in sub-blocks of 32 columns:

1. ``tl.dot`` brings the steps of all earlier sub-blocks to this one's gradients (they lie in the same buffer: a step
   overwrites its gradient);
2. inside the sub-block the columns go one by one. The steps taken so far are a ``[32 columns, 32 rows]`` tile in
   registers, a row of the layer per lane, so that ``G_j + sum_k S_jk e_k`` is a chain of multiply-adds in one lane without
   any exchange between lanes. Loads do not depend on the chain and run ahead of it.

Division is IEEE and rounding half to even (adding and subtracting ``1.5 * 2^23``, or ``2^52`` in float64, after a clamp
to +-512, beyond which every code is clipped anyway), so only the order of sums differs from the torch version. In float32
and TF32 mode the products of step 1 run on tensor cores, as three TF32 products that together keep float32 precision or
as one; in float64 they are sums of outer products, because not every Triton has a float64 dot.

Import this module only where Triton exists.

Shapes: ``o`` output features, ``i`` input features, ``B`` columns of a block.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from omniq.kernels.layer_problem import Problem

_INNER = 32  # columns of a sub-block: a tile of 32 values a lane stays in registers
_ROWS = 32  # rows of a program: one a lane of its single warp, so that sums over columns stay inside a lane


@triton.jit
def _earlier_steps(
    work_ptr, gram_ptr, tile, low, row, there, outputs, stride, INNER: tl.constexpr, PRECISION: tl.constexpr
):  # type: ignore[no-untyped-def]  # Triton reads constants from annotations
    """Add ``S[low:low+n, :low] @ E[:low]`` to the gradients of a sub-block, ``[INNER, ROWS]``."""
    inner = tl.arange(0, INNER)
    if PRECISION == "float64":
        for k in range(0, low):
            step = tl.load(work_ptr + k * outputs + row, mask=there, other=0.0)
            weight = tl.load(gram_ptr + k.to(tl.int64) * stride + low + inner)  # symmetric: a row for a column
            tile += weight[:, None] * step[None, :]
    else:
        for start in range(0, low, INNER):
            rows_of_gram = (low + inner).to(tl.int64)[:, None] * stride
            weight = tl.load(gram_ptr + rows_of_gram + start + inner[None, :])
            steps = tl.load(work_ptr + (start + inner)[:, None] * outputs + row[None, :], mask=there[None, :], other=0.0)
            tile = tl.dot(weight, steps, tile, input_precision=PRECISION)
    return tile


@triton.jit
def _round_block(
    work_ptr, gram_ptr, target_ptr, residual_ptr, scale_ptr, zero_ptr, group_ptr, inverse_ptr, mask_ptr,
    changed_ptr, gain_ptr, outputs, columns, stride, levels,
    MASKED: tl.constexpr, INNER: tl.constexpr, ROWS: tl.constexpr, PRECISION: tl.constexpr, MAGIC: tl.constexpr,
):  # type: ignore[no-untyped-def]  # fmt: skip
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    there = row < outputs
    inner = tl.arange(0, INNER)
    gain = tl.zeros([ROWS], dtype=gain_ptr.dtype.element_ty)
    changed = tl.zeros([ROWS], dtype=tl.int64)
