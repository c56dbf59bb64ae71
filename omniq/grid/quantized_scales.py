# SPDX-License-Identifier: Apache-2.0
"""Scales and zero points that are themselves stored as codes: the second level of SpQR (arXiv 2306.03078, section 4).

In groups of 16 a float16 scale costs a bit a weight. The scales of one group of inputs over a run of neighbouring
output features (16 in the paper) differ little, so only the least and the greatest of a run are kept, and of each of
them a code ``c`` of ``k`` bits on ``L = 2^k - 1`` equal steps in between:

    s(c) = store( (least (L - c) + greatest c) / L )        c = 0 .. L

``store`` rounds to the dtype of scales, and zero points, likewise, to integers. So ``s(c)`` is a scale like any other:
codes of weights are chosen on it, and what a reader computes from the codes is that scale to the bit, on any device:
both products are exact (half-precision scales are multiplied in float32, float32 ones in float64), the sum and the
quotient are rounded once each.

Least and greatest are their own ends, ``s(0)`` and ``s(L)``. So nothing but the values is needed to find their codes
again, and a linear on a grid with a second level holds its scales and zero points as any other does. They take

    k / g + 2 * 16 / (g rows)        bits a weight: 0.31 in place of 1 with k = 3 in groups of g = 16 over 16 rows

Shapes: ``o`` output features, ``G`` groups, ``R = ceil(o / rows)`` runs; the last may be short.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from omniq.errors import UserError


@dataclass(frozen=True)
class QuantizedScales:
    """How scales and zero points are stored.

    Args:
        scale_bits: of a scale's code, 2 to 8 (3 in the paper); 0 to store scales as they are.
        zero_bits: of a zero point's code, 2 to 8 (3 in the paper); 0 to store zero points as they are.
        rows: output features whose scales share a least and a greatest one (16 in the paper).

    Raises:
        UserError: bits that are not possible, or a run of fewer than two rows.
    """

    scale_bits: int = 3
    zero_bits: int = 3
    rows: int = 16

    def __post_init__(self) -> None:
        for name, bits in (("scale_bits", self.scale_bits), ("zero_bits", self.zero_bits)):
            if bits and not 2 <= bits <= 8:
                raise UserError(
                    f"{name} {bits} is not possible: give 2 to 8 (3 is usual), or 0 to store them as they are"
                )
        if self.rows < 2:
            raise UserError(
                f"scale_group {self.rows} leaves no run of scales to share a range: give 2 or more, such as 16"
            )

    def runs(self, outputs: int) -> int:
        """Runs of ``outputs`` rows."""
        return -(-outputs // self.rows)

    def stored_bits(self, values: Tensor, code_bits: int, value_bits: int) -> int:
        """Bits that values ``[o, G]`` take: codes and two ends a run, or the values where ``code_bits`` is 0."""
        if not code_bits:
            return values.numel() * value_bits
        return values.numel() * code_bits + 2 * self.runs(values.shape[0]) * values.shape[1] * value_bits

    def ends(self, values: Tensor) -> tuple[Tensor, Tensor]:
        """Least and greatest value of each run, both ``[R, G]``, of ``[o, G]``."""
        missing = self.runs(len(values)) * self.rows - len(values)
        runs = torch.cat([values, values[-1:].expand(missing, -1)]).unflatten(0, (-1, self.rows))
        return runs.amin(1), runs.amax(1)

    def spread(self, per_run: Tensor, outputs: int) -> Tensor:
        """Repeat a value per run, ``[R, G]``, over its rows, ``[o, G]``."""
        return per_run.repeat_interleave(self.rows, 0)[:outputs]

    def encode(self, values: Tensor, bits: int) -> tuple[Tensor, Tensor]:
        """Codes and ends of values that lie on the levels of their runs.

        Args:
            values: ``[o, G]``, scales in their storage dtype or zero points in uint8.
            bits: of a code.

        Returns:
            codes uint8 ``[o, G]``, and ends ``[2 R, G]`` in the dtype of values: the least of each run, then the
            greatest.

        Raises:
            ValueError: a value lies between two levels.
        """
        least, greatest = self.ends(values)
        codes, levels = nearest(values, self.spread(least, len(values)), self.spread(greatest, len(values)), bits)
        if not torch.equal(levels, values):
            raise ValueError(
                f"values are not on {2**bits} levels between the least and the greatest of {self.rows} rows"
            )
        return codes, torch.cat([least, greatest])

    def decode(self, codes: Tensor, ends: Tensor, bits: int) -> Tensor:
        """Invert ``encode``: the values, ``[o, G]``, in the dtype of the ends."""
        least, greatest = (self.spread(end, len(codes)) for end in ends.chunk(2))
        return level(least, greatest, codes, bits)


def level(least: Tensor, greatest: Tensor, codes: Tensor | int, bits: int) -> Tensor:
    """``s(c)``, in the dtype of the ends, which says how values are stored; see the module's text.

    Args:
        least, greatest: of the runs, ``[o, G]``: floating, or uint8 for zero points.
        codes: one for all, or ``[o, G]``.
        bits: of a code.
    """
    dtype, top = least.dtype, 2**bits - 1
    wide = torch.float64 if dtype == torch.float32 else torch.float32
    up = codes.to(wide) if isinstance(codes, Tensor) else float(codes)
    # NOTE: CUDA multiplies by the reciprocal of a number, which may miss the last bit; by a tensor it divides.
    value = (least.to(wide) * (top - up) + greatest.to(wide) * up) / least.new_full((), top, dtype=wide)
    return value.to(dtype) if dtype.is_floating_point else value.round().to(dtype)


def nearest(values: Tensor, least: Tensor, greatest: Tensor, bits: int) -> tuple[Tensor, Tensor]:
    """Codes of the nearest levels, uint8, and those levels; all ``[o, G]``, the lower one between two.

    Levels are compared as they are stored, so that a value that is one finds a code of exactly that value.
    """
    codes, chosen = torch.zeros_like(values, dtype=torch.uint8), least
    for code in range(1, 2**bits):
        candidate = level(least, greatest, code, bits)
        closer = (values.double() - candidate.double()).abs() < (values.double() - chosen.double()).abs()
        codes, chosen = torch.where(closer, code, codes), torch.where(closer, candidate, chosen)
    return codes, chosen
