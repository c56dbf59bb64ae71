# SPDX-License-Identifier: Apache-2.0
"""The scheme that belongs to a grid."""

from typing import Any

from omniq.grid.affine import Grid
from omniq.grid.scheme import Scheme


def scheme_of(grid: Grid, activation_bits: int = 16, kv_bits: int = 16, **settings: Any) -> Scheme:
    """The scheme of weights on this grid; ``settings`` are further fields of ``Scheme``."""
    cache = "" if kv_bits == 16 else f"KV{kv_bits}"
    group = "" if grid.group_size == -1 else f"g{grid.group_size}"
    dtype = str(grid.scale_dtype).removeprefix("torch.")
    return Scheme(f"W{grid.bits}A{activation_bits}{cache}{group}", grid.symmetric, dtype, **settings)  # type: ignore
