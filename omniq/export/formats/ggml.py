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

from collections.abc import Collection, Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from omniq.export.formats.codec import Shape
from omniq.export.formats.weights_only import WeightsOnly
from omniq.export.restate import restate
from omniq.grid.affine import Grid
from omniq.storage.block_result import QuantizedLinear

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


class Ggml(WeightsOnly):
    """Blocks of the type that fits the grid of each linear."""

    name = "gguf"
    one_grid = False
    requires: tuple[str, ...] = ("gguf>=0.17",)

    def problem_of_grids(self, grids: Mapping[Grid, Collection[Shape]]) -> str:
        """The reason why no block holds these grids, as the end of a sentence; empty if blocks hold them."""
        for grid, shapes in grids.items():
            if grid.group_size != -1 and grid.group_size % Q4_0.size:
                return (
                    f"does not support groups of {grid.group_size}, only multiples of {Q4_0.size}: use g32, g64 or g128"
                )
            if block_type(grid) is None:
                return f"does not support {grid.bits} bits with zero points: set scheme.symmetric to true, or use W7"
            if widths := [inputs for _, inputs in shapes if inputs % Q4_0.size]:
                return (
                    f"does not support a linear of {widths[0]} inputs, which is not a multiple of {Q4_0.size}: leave "
                    "it in floating point by scheme.rules"
                )
        return ""

    def bits(self, grid: Grid) -> int:
        """Bits of a code on disk."""
        return _type_of(grid).bits

    def uses(self, type: BlockType) -> bool:
        """True if a grid of the scheme is stored in blocks of this type."""
        return any(block_type(grid) is type for grid in self._scheme.grids)

    def as_stored(self, linear: QuantizedLinear) -> QuantizedLinear:
        """The same weights on the symmetric grid of the block."""
        bits = _type_of(linear.grid).bits
        return restate(linear, replace(linear.grid, bits=bits, symmetric=True))

    def tensors(self, linear: QuantizedLinear) -> dict[str, Tensor]:
        """Bytes ``[o, B * bytes]`` of the blocks, by the name of their type."""
        type, stored = _type_of(linear.grid), self.as_stored(linear)
        codes, d = stored.codes.unflatten(1, (-1, type.size)), stored.scale
        if type is Q2_0:
            codes, d = 3 - codes, -d
        d = d.repeat_interleave(codes.shape[1] // d.shape[1], dim=1).unsqueeze(-1)  # [o, B, 1]
        return {type.name: torch.cat([d.contiguous().view(torch.uint8), type.pack(codes)], dim=-1).flatten(1)}

    def linear(self, stored: Mapping[str, Tensor], grid: Grid) -> QuantizedLinear:
        """Invert ``tensors`` up to ``as_stored``.

        Args:
            stored: as ``tensors`` returns it.
            grid: the grid of the linear in the run.

        Raises:
            KeyError: no tensor of the type is there.
            ValueError: the blocks of a group have different scales, or the number of bytes is wrong.
        """
        type = _type_of(grid)
        blocks = stored[type.name].unflatten(1, (-1, type.bytes))
        codes, d = type.unpack(blocks[..., 2:]), blocks[..., :2].contiguous().view(torch.float16).squeeze(-1)
        if type is Q2_0:
            codes, d = 3 - codes, -d
        groups = d.unflatten(1, (grid.groups(codes.shape[1] * type.size), -1))  # [o, G, blocks of a group]
        if not torch.equal(groups, groups[..., :1].expand_as(groups)):
            raise ValueError("the blocks of a group have different scales")
        held = replace(grid, bits=type.bits, symmetric=True)
        middle = torch.full_like(groups[..., 0], 2 ** (type.bits - 1))
        return QuantizedLinear.of(held, codes.flatten(1), groups[..., 0], middle)


def _type_of(grid: Grid) -> BlockType:
    """The type of a grid that ``check`` accepted."""
    type = block_type(grid)
    if type is None:
        raise ValueError(f"no block of ggml holds {grid}")
    return type
