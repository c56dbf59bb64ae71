# SPDX-License-Identifier: Apache-2.0
"""Blocks of ggml, the types of llama.cpp's GGUF files that hold an integer grid without rounding.

A block holds ``n`` consecutive inputs of one output row: a float16 ``d``, then codes ``u``.

    type   n    bytes  value           holds ``v = q - z`` in   grids of omniq
    Q2_0   64   18     d (u - 1)       see below                2 bits, symmetric
    Q4_0   32   18     d (u - 8)       [-8, 7]                  2 and 3 bits; 4 bits, symmetric
    Q5_0   32   22     d (u - 16)      [-16, 15]                4 bits; 5 bits, symmetric
    Q8_0   32   34     d (u - 128)     [-128, 127]              5 to 7 bits; 8 bits, symmetric

``d`` is the scale of the group, repeated for each block of the group. ggml has no zero points, so ``q`` and ``z`` are
stored as their difference: ``u = v + zero``, which is the symmetric grid of the width of the block
(``Ggml.as_stored``). The weights are the same numbers.

Q2_0 has the values -1, 0, 1 and 2, times ``d``. The symmetric grid of 2 bits has -2, -1, 0 and 1, times ``s``: it is
stored with ``d = -s`` and ``u = 3 - q``. Q2_0 takes 2.25 bits for each weight and needs a llama.cpp of mid-2026 or
later (type 42).

Order of the codes in a block: Q4_0 and Q5_0 store elements ``k`` and ``k + 16`` in the low and high half of byte ``k``;
Q5_0 also stores the fifth bit of element ``k`` as bit ``k`` of a 32-bit word before these bytes; Q8_0 stores signed
bytes; Q2_0 stores four consecutive elements in a byte, the first in the lowest bits. Source: ``ggml-quants.c``.

Q4_1 stores ``d u + m`` with a float16 ``m = -z s``, which is rounded for most scales, so omniq uses Q5_0 instead.

Shapes: ``o`` output features, ``i`` input features, ``G`` groups of a row, ``B = i / n`` blocks of a row.
"""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from omniq.errors import UserError
from omniq.export.formats.codec import check_middle, check_scheme, stored_under
from omniq.grid.affine import Grid
from omniq.grid.scheme import Scheme
from omniq.models.layout import Layout
from omniq.storage.block_result import QuantizedLinear

_NAME = "gguf"  # the name that users type
_HALVES = 16  # element k shares a byte with element k + 16


@dataclass(frozen=True)
class BlockType:
    """A type of blocks.

    Args:
        name: its name in ggml.
        number: its number in a GGUF file.
        file_type: the value of ``general.file_type`` for a file of such blocks.
        size: elements of a block.
        bits: bits of a code.
    """

    name: str
    number: int
    file_type: int
    size: int
    bits: int

    @property
    def bytes(self) -> int:
        """Bytes of a block: a float16 and the codes."""
        return 2 + self.size * self.bits // 8

    def pack(self, codes: Tensor) -> Tensor:
        """Bytes of the codes, ``[o, B, bytes - 2]``, from uint8 codes ``[o, B, n]``."""
        if self.bits == 8:
            return codes ^ 128  # u - 128 as a signed byte
        if self.bits == 2:
            quarters = codes.unflatten(-1, (-1, 4))
            return quarters[..., 0] | quarters[..., 1] << 2 | quarters[..., 2] << 4 | quarters[..., 3] << 6
        low, high = codes[..., :_HALVES], codes[..., _HALVES:]
        halves = (low & 15) | (high & 15) << 4
        if self.bits == 4:
            return halves
        fifth = (codes >> 4).unflatten(-1, (4, 8)) << torch.arange(8, dtype=torch.uint8)
        return torch.cat([fifth.sum(-1, dtype=torch.uint8), halves], dim=-1)

    def unpack(self, data: Tensor) -> Tensor:
        """Invert ``pack``."""
        if self.bits == 8:
            return data ^ 128
        if self.bits == 2:
            return (data.unsqueeze(-1) >> torch.arange(0, 8, 2, dtype=torch.uint8) & 3).flatten(-2)
        halves = data[..., -_HALVES:]
        codes = torch.cat([halves & 15, halves >> 4], dim=-1)
        if self.bits == 4:
            return codes
        fifth = data[..., :4].unsqueeze(-1) >> torch.arange(8, dtype=torch.uint8) & 1
        return codes | fifth.flatten(-2) << 4


Q2_0 = BlockType("Q2_0", 42, 41, 64, 2)
Q4_0 = BlockType("Q4_0", 2, 2, 32, 4)
Q5_0 = BlockType("Q5_0", 6, 8, 32, 5)
Q8_0 = BlockType("Q8_0", 8, 7, 32, 8)
BLOCK_TYPES = {type.name: type for type in (Q2_0, Q4_0, Q5_0, Q8_0)}


def block_type(grid: Grid) -> BlockType | None:
    """The smallest type that holds every code of a grid; None if no type does."""
    if grid.group_size != -1 and grid.group_size % Q4_0.size:
        return None
    if grid.bits == 2 and grid.symmetric and grid.group_size % Q2_0.size == 0:
        return Q2_0
    needed = grid.bits if grid.symmetric else grid.bits + 1  # q - z is in [-L, L] on an asymmetric grid
    return next((type for type in (Q4_0, Q5_0, Q8_0) if type.bits >= needed), None)


class Ggml:
    """Blocks of the type that fits the grid of each linear."""

    requires: tuple[str, ...] = ("gguf",)

    def __init__(self, scheme: Scheme) -> None:
        self._scheme = scheme

    def check(self, layouts: Sequence[Layout] = (), grids: Collection[Grid] = (), outliers: bool = False) -> None:
        """Refuse a scheme with a part that blocks cannot hold.

        These are quantized activations, outliers, scales in another dtype than float16, grids of 8 bits with zero
        points, and groups that are not a multiple of a block.

        Raises:
            UserError: names the scheme and the remedy.
        """
        scheme, problem = self._scheme, ""
        unheld = next((grid for grid in grids if block_type(grid) is None), None)
        if outliers:
            problem = "cannot hold the sparse outliers or quantized scales of this method: use format omniq"
        elif scheme.activations.quantized:
            problem = "holds weights only: use A16, or format compressed-tensors or omniq for quantized activations"
        elif scheme.export_dtype != torch.float16:
            problem = (
                f"holds float16 scales, not {scheme.dtype}: set scheme.dtype to float16, or use format "
                "compressed-tensors or omniq"
            )
        elif unheld is not None and unheld.group_size != -1 and unheld.group_size % Q4_0.size:
            problem = (
                f"holds groups of a multiple of {Q4_0.size} inputs, not {unheld.group_size}: use g32, g64 or g128, or "
                "format compressed-tensors or omniq"
            )
        elif unheld is not None:
            problem = (
                f"cannot hold {unheld.bits} bits with zero points: set scheme.symmetric to true, use 7 bits or fewer, "
                "or use format compressed-tensors or omniq"
            )
        check_scheme(scheme, _NAME, problem)

    def check_linear(self, name: str, linear: QuantizedLinear) -> None:
        """Refuse a linear with outliers or a width that is not a multiple of a block, and contradictory zero points.

        Raises:
            UserError: another format can store the linear.
            ValueError: the zero point of a symmetric linear is not the middle of the code range.
        """
        if linear.outliers is not None or linear.grid.second is not None:
            what = "outliers" if linear.outliers is not None else "quantized scales"
            raise UserError(f"{name} has {what}, which format {_NAME} does not support: use format omniq")
        width = linear.codes.shape[1]
        if width % Q4_0.size:
            raise UserError(
                f"{name} has {width} inputs, and format {_NAME} holds multiples of {Q4_0.size}: use format "
                "compressed-tensors or omniq"
            )
        check_middle(name, linear)

    def uses(self, type: BlockType) -> bool:
        """True if a grid of the scheme is stored in blocks of this type."""
        return any(block_type(grid) is type for grid in self._scheme.grids)

    def bits(self, grid: Grid) -> int:
        """Bits of a code on disk."""
        return _type_of(grid).bits

    def as_stored(self, linear: QuantizedLinear) -> QuantizedLinear:
        """The same weights on the symmetric grid of the block: ``q - z`` is kept, and ``z`` becomes the middle."""
        bits = _type_of(linear.grid).bits
        middle = 2 ** (bits - 1)
        grid = Grid(bits, linear.grid.group_size, True, linear.grid.scale_dtype)
        zero_point = linear.grid.expand(linear.zero_point, linear.codes.shape[1])
        codes = linear.codes.to(torch.int16) - zero_point + middle
        return QuantizedLinear.of(grid, codes, linear.scale, torch.full_like(linear.zero_point, middle))

    def store(self, name: str, linear: QuantizedLinear) -> dict[str, Tensor]:
        """Bytes ``[o, B * bytes]`` of the blocks, under the name of the linear and of the type."""
        type = _type_of(linear.grid)
        stored = self.as_stored(linear)
        codes, d = stored.codes.unflatten(1, (-1, type.size)), stored.scale
        if type is Q2_0:
            codes, d = 3 - codes, -d
        d = d.repeat_interleave(codes.shape[1] // d.shape[1], dim=1).unsqueeze(-1)  # [o, B, 1]
        return {
            f"{name}.{type.name}": torch.cat([d.contiguous().view(torch.uint8), type.pack(codes)], dim=-1).flatten(1)
        }

    def load(self, name: str, tensors: Mapping[str, Tensor], grid: Grid) -> QuantizedLinear:
        """Invert ``store`` up to ``as_stored``.

        Args:
            name: full name of the linear.
            tensors: as ``store`` returns them.
            grid: the grid of the linear in the run.

        Raises:
            KeyError: no tensor of the type is there.
            ValueError: the blocks of a group have different scales, or the number of bytes is wrong.
        """
        type = _type_of(grid)
        data = stored_under(name, tensors)[type.name]
        blocks = data.unflatten(1, (-1, type.bytes))
        codes, d = type.unpack(blocks[..., 2:]), blocks[..., :2].contiguous().view(torch.float16).squeeze(-1)
        if type is Q2_0:
            codes, d = 3 - codes, -d
        groups = d.unflatten(1, (grid.groups(codes.shape[1] * type.size), -1))  # [o, G, blocks of a group]
        if not torch.equal(groups, groups[..., :1].expand_as(groups)):
            raise ValueError("the blocks of a group have different scales")
        held = Grid(type.bits, grid.group_size, True, torch.float16)
        middle = torch.full_like(groups[..., 0], 2 ** (type.bits - 1))
        return QuantizedLinear.of(held, codes.flatten(1), groups[..., 0], middle)


def _type_of(grid: Grid) -> BlockType:
    """The type of a grid that ``check`` accepted."""
    type = block_type(grid)
    if type is None:
        raise ValueError(f"no block of ggml holds {grid}")
    return type
