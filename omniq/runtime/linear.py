# SPDX-License-Identifier: Apache-2.0
"""A linear that keeps its weight in stored form: packed codes, scales, zero points and sparse outliers.

    y = x W^T + b,   W = round_to_dtype_of_x( (q - z) s + outliers )

Every call dequantizes the weight and frees it afterwards. The function is the one that calibration used, so the model
computes with exactly the optimised values.

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
    """Replaces a linear; its buffers are uninitialized until a checkpoint is loaded into them.

    Args:
        linear: the linear to replace; its shape, bias and device are kept.
        grid: the grid of the codes.
        outliers: number of weights that are kept in float16 beside the codes; None without a sparse part.

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
        # NOTE: the shape comes from Python, because reading it from its buffer would synchronize the GPU on every call
        shape = torch.tensor((self.out_features, self.in_features))
        return unpack_linear({**dict(self.named_buffers()), "weight_shape": shape}, self.grid)

    def forward(self, x: Tensor) -> Tensor:
        """Map inputs ``[..., i]`` to outputs ``[..., o]``."""
        return F.linear(x, self.quantized().dequantize(x.dtype), self.bias)

    def plain(self, dtype: torch.dtype) -> nn.Linear:
        """Convert to a stock linear, with the weight rounded once to ``dtype``."""
        linear = nn.Linear(self.in_features, self.out_features, bias=False, device="meta")
        linear.weight = nn.Parameter(self.quantized().dequantize(dtype))
        linear.bias = self.bias
        return linear

    def check(self, name: str) -> None:
        """Refuse outliers that lie outside the matrix, before they cause an error on a GPU.

        Raises:
            CorruptFile: names the linear.
        """
        sparse = self.quantized().outliers
        if sparse is None:
            return
        pointer, column = sparse.row_pointer, sparse.column
        rising = pointer[0] == 0 and pointer[-1] == len(column) and bool((pointer.diff() >= 0).all())
        if not rising or bool(((column < 0) | (column >= self.in_features)).any()):
            raise CorruptFile(f"{name}: outliers lie outside the {self.out_features} x {self.in_features} weights")

    def extra_repr(self) -> str:
        """Text for ``print(model)``."""
        outliers = "" if self.outliers is None else f", outliers={self.outliers}"
        return f"{self.in_features}, {self.out_features}, bias={self.bias is not None}, {self.grid}{outliers}"

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "PackedLinear":
        """Move to a device, but never cast: ``model.to(torch.float16)`` must not round stored scales again."""
        before = dict(self.named_buffers())
        super()._apply(fn, recurse)
        for name, buffer in before.items():
            now = self.get_buffer(name)
            if now.dtype != buffer.dtype:
                self.register_buffer(name, buffer.to(now.device))
        return self
