# SPDX-License-Identifier: Apache-2.0
"""Scales and zero points that are stored as codes: bilevel quantization as in SpQR (arXiv 2306.03078, section 4).

In groups of 16, a float16 scale costs one bit per weight. The scales of one group of inputs over a run of neighbouring
output features (16 in the paper) differ little. Therefore only the smallest and the largest scale of a run are stored,
and for each scale a code ``c`` of ``k`` bits on ``L = 2^k - 1`` equal steps between them:

    s(c) = store( (least (L - c) + greatest c) / L )        c = 0 .. L

``store`` rounds scales to their dtype, and zero points to integers. So ``s(c)`` is a scale like any other: codes of
weights are chosen on it, and a reader recomputes it bit for bit from the codes, on any device. Both products are exact
(half-precision scales are multiplied in float32, float32 scales in float64), and the sum and the quotient are rounded
once each.

Smallest and largest are themselves levels, ``s(0)`` and ``s(L)``. The codes can therefore be recovered from the values
alone, and a linear with quantized scales holds plain scales and zero points like any other. They take

    k / g + 2 * 16 / (g rows)        bits per weight: 0.31 instead of 1 with k = 3 in groups of g = 16 over 16 rows

Shapes: ``o`` output features, ``G`` groups, ``R = ceil(o / rows)`` runs; the last run may be shorter.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from omniq.grid.name import check_scale_codes


@dataclass(frozen=True)
class QuantizedScales:
    """How scales and zero points are stored.

    Args:
        scale_bits: bits of the code of a scale, 2 to 8 (3 in the paper); 0 to store scales without codes.
        zero_bits: bits of the code of a zero point, 2 to 8 (3 in the paper); 0 to store zero points without codes.
        rows: number of output features in a run, whose scales share a smallest and a largest value (16 in the paper).

    Raises:
        UserError: the bits of a code are out of range, or a run has fewer than two rows.
    """

    scale_bits: int = 3
    zero_bits: int = 3
    rows: int = 16

    def __post_init__(self) -> None:
        check_scale_codes(self.scale_bits, self.zero_bits, self.rows)

    def runs(self, outputs: int) -> int:
        """Number of runs in ``outputs`` rows."""
        return -(-outputs // self.rows)

    def stored_bits(self, values: Tensor, code_bits: int, value_bits: int) -> int:
        """Stored bits of values ``[o, G]``: codes and two ends per run, or plain values if ``code_bits`` is 0."""
        if not code_bits:
            return values.numel() * value_bits
        return values.numel() * code_bits + 2 * self.runs(values.shape[0]) * values.shape[1] * value_bits

    def ends(self, values: Tensor) -> tuple[Tensor, Tensor]:
        """Smallest and largest value of each run, both ``[R, G]``, from values ``[o, G]``."""
        missing = self.runs(len(values)) * self.rows - len(values)
        runs = torch.cat([values, values[-1:].expand(missing, -1)]).unflatten(0, (-1, self.rows))
        return runs.amin(1), runs.amax(1)

    def spread(self, per_run: Tensor, outputs: int) -> Tensor:
        """Repeat the value of each run, ``[R, G]``, over its rows, ``[o, G]``."""
        return per_run.repeat_interleave(self.rows, 0)[:outputs]

    def encode(self, values: Tensor, bits: int) -> tuple[Tensor, Tensor]:
        """Encode values that lie on the levels of their runs.

        Args:
            values: ``[o, G]``, scales in their storage dtype or zero points in uint8.
            bits: bits of a code.

        Returns:
            codes uint8 ``[o, G]``, and ends ``[2 R, G]`` in the dtype of the values: the smallest value of each run,
            then the largest.

        Raises:
            ValueError: a value lies between two levels.
        """
        least, greatest = self.ends(values)
        codes, levels = nearest(values, self.spread(least, len(values)), self.spread(greatest, len(values)), bits)
        if not torch.equal(levels, values):
            raise ValueError(
                f"values are not on {2**bits} levels between the smallest and the largest of {self.rows} rows"
            )
        return codes, torch.cat([least, greatest])

    def decode(self, codes: Tensor, ends: Tensor, bits: int) -> Tensor:
        """Invert ``encode``; returns the values, ``[o, G]``, in the dtype of the ends."""
        least, greatest = (self.spread(end, len(codes)) for end in ends.chunk(2))
        return level(least, greatest, codes, bits)


def level(least: Tensor, greatest: Tensor, codes: Tensor | int, bits: int) -> Tensor:
    """Compute ``s(c)`` (see the module docstring) in the dtype of the ends, which is the storage dtype.

    Args:
        least, greatest: ends of the runs, ``[o, G]``; floating point for scales, uint8 for zero points.
        codes: one code for all values, or codes ``[o, G]``.
        bits: bits of a code.
    """
    dtype, top = least.dtype, 2**bits - 1
    wide = torch.float64 if dtype == torch.float32 else torch.float32
    up = codes.to(wide) if isinstance(codes, Tensor) else float(codes)
    # NOTE: the divisor is a tensor, because CUDA multiplies by the reciprocal of a number, which may miss the last bit.
    value = (least.to(wide) * (top - up) + greatest.to(wide) * up) / least.new_full((), top, dtype=wide)
    return value.to(dtype) if dtype.is_floating_point else value.round().to(dtype)


def nearest(values: Tensor, least: Tensor, greatest: Tensor, bits: int) -> tuple[Tensor, Tensor]:
    """Codes of the nearest levels, uint8, and the levels, all ``[o, G]``; a tie takes the lower level.

    Storage-rounded levels are compared, so a value that is a level gets a code of exactly this value.
    """
    codes, chosen = torch.zeros_like(values, dtype=torch.uint8), least
    for code in range(1, 2**bits):
        candidate = level(least, greatest, code, bits)
        closer = (values.double() - candidate.double()).abs() < (values.double() - chosen.double()).abs()
        codes, chosen = torch.where(closer, code, codes), torch.where(closer, candidate, chosen)
    return codes, chosen
