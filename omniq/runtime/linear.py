# SPDX-License-Identifier: Apache-2.0
"""A linear that holds its weight as it is stored: packed codes, scales, zero points and sparse outliers.

    y = x W^T + b,   W = round_to_dtype_of_x( (q - z) s + outliers )

The weight is made anew on every call and let go after it, by the same function that the calibration deployed with, so
the model computes with the numbers that were optimised.

Shapes: ``o`` output features, ``i`` input features.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from omniq.errors import CorruptFile
from omniq.export.formats.omniq import packed_shapes, unpack_linear
from omniq.grid.affine import Grid
from omniq.storage.block_result import QuantizedLinear


class PackedLinear(nn.Module):
    """Takes the place of a linear; its buffers are empty until a checkpoint is read into them.

    Args:
        linear: the one that it replaces; shape, bias and device are taken over.
        grid: of its codes.
        outliers: how many weights are kept in float16 beside them; None if there is no sparse part.

    Raises:
        UserError: the group size does not divide the inputs.
    """

    def __init__(self, linear: nn.Linear, grid: Grid, outliers: int | None) -> None:
        super().__init__()
        self.in_features, self.out_features, self.grid, self.outliers = (
            linear.in_features,
            linear.out_features,
            grid,
            outliers,
        )
        shapes = packed_shapes(grid, self.out_features, self.in_features, outliers)
        for name, (shape, dtype) in shapes.items():
            self.register_buffer(name, torch.empty(shape, dtype=dtype, device=linear.weight.device))
        self.bias = linear.bias

    def quantized(self) -> QuantizedLinear:
        """Codes, scales, zero points and outliers, on the device of the buffers."""
        # NOTE: the shape from Python: reading it from its buffer would halt a GPU on every call
        shape = torch.tensor((self.out_features, self.in_features))
        return unpack_linear({**dict(self.named_buffers()), "weight_shape": shape}, self.grid)

    def forward(self, x: Tensor) -> Tensor:
        """``[..., i]`` to ``[..., o]``."""
        return F.linear(x, self.quantized().dequantize(x.dtype), self.bias)

    def plain(self, dtype: torch.dtype) -> nn.Linear:
        """The same as a stock linear, its weight rounded once to ``dtype``."""
        linear = nn.Linear(self.in_features, self.out_features, bias=False, device="meta")
        linear.weight = nn.Parameter(self.quantized().dequantize(dtype))
        linear.bias = self.bias
        return linear

    def check(self, name: str) -> None:
        """Refuse outliers that lie outside the matrix, before a GPU meets them.

        Raises:
            CorruptFile: names the linear.
        """
        sparse = self.quantized().outliers
        if sparse is None:
            return
        pointer, column = sparse.row_pointer, sparse.column
        rising = pointer[0] == 0 and pointer[-1] == len(column) and bool((pointer.diff() >= 0).all())
        if not rising or bool(((column < 0) | (column >= self.in_features)).any()):
            raise CorruptFile(f"{name}: its outliers lie outside the {self.out_features} x {self.in_features} weights")

    def extra_repr(self) -> str:
        """Shown by ``print(model)``."""
        outliers = "" if self.outliers is None else f", outliers={self.outliers}"
        return f"{self.in_features}, {self.out_features}, bias={self.bias is not None}, {self.grid}{outliers}"

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "PackedLinear":
        """Move to a device, never to a dtype: ``model.to(torch.float16)`` must not round stored scales again."""
        before = dict(self.named_buffers())
        super()._apply(fn, recurse)
        for name, buffer in before.items():
            now = self.get_buffer(name)
            if now.dtype != buffer.dtype:
                self.register_buffer(name, buffer.to(now.device))
        return self
