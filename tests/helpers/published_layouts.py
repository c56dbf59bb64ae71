# SPDX-License-Identifier: Apache-2.0
"""Readers of published layouts in plain Python integers, independent of omniq's packing.

Each returns ``(q - z) * s`` in float64, ``[o, i]``, from the tensors of one linear.
"""

from collections.abc import Mapping, Sequence

import numpy as np
from torch import Tensor

AUTOAWQ_ORDER = (0, 4, 1, 5, 2, 6, 3, 7)  # the nibble that holds each of eight outputs: AutoAWQ's AWQ_REVERSE_ORDER


def bit_stream(words: Sequence[int], bits: int) -> list[int]:
    """The numbers in int32 words: the words form one large integer, the first word in the lowest bits."""
    stream = sum((word & 0xFFFFFFFF) << (32 * place) for place, word in enumerate(words))
    return [(stream >> (bits * place)) & (2**bits - 1) for place in range(32 * len(words) // bits)]


def gptq_weight(stored: Mapping[str, Tensor], bits: int, offset: int, group_of: Sequence[int]) -> np.ndarray:
    """A linear of GPTQ or AutoRound.

    Args:
        stored: ``qweight``, ``qzeros`` and ``scales``.
        bits: of codes and zero points.
        offset: 1 if zero points are stored minus 1, which readers undo without a carry.
        group_of: the group of each input.
    """
    q = np.array([bit_stream(column, bits) for column in stored["qweight"].t().tolist()])  # [o, i]
    z = np.array([bit_stream(row, bits) for row in stored["qzeros"].tolist()]).T + offset  # [o, G]
    return _dequantized(q, z, stored["scales"], group_of)


def awq_weight(stored: Mapping[str, Tensor], group_of: Sequence[int]) -> np.ndarray:
    """A linear of AWQ in its GEMM layout."""
    q, z = (np.array([_awq_row(row) for row in stored[key].tolist()]).T for key in ("qweight", "qzeros"))
    return _dequantized(q, z, stored["scales"], group_of)


def _awq_row(words: Sequence[int]) -> list[int]:
    return [(word >> (4 * nibble)) & 15 for word in words for nibble in AUTOAWQ_ORDER]


def _dequantized(q: np.ndarray, z: np.ndarray, scales: Tensor, group_of: Sequence[int]) -> np.ndarray:
    group = np.asarray(group_of)
    return (q - z[:, group]) * scales.double().numpy().T[:, group]
