# SPDX-License-Identifier: Apache-2.0
"""Scheme names in the usual notation: ``W4A16``, ``W3A16g128``, ``W4A4KV8``.

This module does not import torch, so that a configuration can be checked without it.
"""

import re
from typing import Literal, NamedTuple, get_args

from omniq.errors import UserError

ContainerBits = Literal[4, 8]
"""The bits in which a checkpoint may store narrower codes: the widths for which common runtimes have kernels."""

CONTAINER_BITS: tuple[int, ...] = get_args(ContainerBits)

ZeroPoints = Literal["any", "nonzero", "inner"]
"""The zero points of asymmetric grids: 0 to ``2^b - 1``, 1 to ``2^b - 1``, or 1 to ``2^b - 2``."""

ScaleBits = Literal[8]
"""Significant bits of scales that float16 and bfloat16 both hold."""

_SCHEME = re.compile(r"W(?P<weight>\d+)A(?P<activation>\d+)(?:KV(?P<kv>\d+))?(?:g(?P<group>\d+))?", re.IGNORECASE)


class SchemeName(NamedTuple):
    """The parts of a scheme name.

    Args:
        bits: bits of the weights.
        activation_bits: bits of the inputs of linears; 16 if they are not quantized.
        kv_bits: bits of keys and values; 16 if they are not quantized.
        group_size: number of weights that share one scale; -1 for one scale per output channel.
    """

    bits: int
    activation_bits: int
    kv_bits: int
    group_size: int

    def __str__(self) -> str:
        cache = "" if self.kv_bits == 16 else f"KV{self.kv_bits}"
        group = "" if self.group_size == -1 else f"g{self.group_size}"
        return f"W{self.bits}A{self.activation_bits}{cache}{group}"


def parse_scheme(name: str) -> SchemeName:
    """Parse the name of a scheme.

    Raises:
        UserError: the name does not have the form of a scheme.
    """
    match = _SCHEME.fullmatch(name)
    if match is None:
        raise UserError(f"scheme {name!r} is not valid: write W<bits>A<bits>[KV<bits>][g<size>], such as W3A16g128")
    given = match.groupdict()
    kv, group = int(given["kv"] or 16), int(given["group"] or -1)
    return SchemeName(int(given["weight"]), int(given["activation"]), kv, group)


def check_weights(bits: int, group_size: int) -> None:
    """Refuse bits and group sizes of weights that no grid supports.

    Raises:
        UserError: ``bits`` is outside 2 to 8, or the group size is neither -1 nor positive.
    """
    if not 2 <= bits <= 8:
        raise UserError(f"weight bits {bits} are outside 2..8: choose a scheme from W2 to W8, such as W4A16")
    if group_size != -1 and group_size < 1:
        raise UserError(f"group size {group_size} is not valid: give a positive size, or -1 for per-channel scales")


def check_scale_codes(scale_bits: int, zero_bits: int, rows: int) -> None:
    """Refuse codes of scales and zero points that no format can store; the arguments of ``QuantizedScales``.

    Raises:
        UserError: the bits of a code are out of range, or a run has fewer than two rows.
    """
    for name, bits in (("scale_bits", scale_bits), ("zero_bits", zero_bits)):
        if bits and not 2 <= bits <= 8:
            raise UserError(
                f"{name} {bits} is out of range: give 2 to 8 (3 is usual), or 0 to store the values without codes"
            )
    if rows < 2:
        raise UserError(f"scale_group {rows} is too small for scales to share a range: give 2 or more, such as 16")
