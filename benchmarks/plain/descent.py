# SPDX-License-Identifier: Apache-2.0
"""Coordinate descent as the published code arranges it: what ``benchmarks/coordinate_descent.py`` compares with.

With N the Gram matrix over its diagonal, a sweep makes one product ``P^ = W^ N`` and then, for each column j,

    beta_j = P_j - P^_j + (W^(old) - W^(new))[:, :j] N[:j, j]

by a matrix-vector product, and rounds it. Unlike there, nothing is read back to the host between columns.
"""

from collections.abc import Iterable

from torch import Tensor


def published_sweeps(
    weight: Tensor, gram: Tensor, grid: tuple[Tensor, Tensor], levels: int, kinds: Iterable[bool]
) -> Tensor:
    """Sweeps over a layer, a column at a time.

    Args:
        weight: ``[o, i]``; gram: ``[i, i]``.
        grid: scale and zero point, ``[o, 1]``; levels: the largest code.
        kinds: for each sweep, whether it rounds.

    Returns:
        ``W^``, ``[o, i]``.
    """
    scale, zero_point = (part[:, 0].to(gram) for part in grid)
    normalized = gram / gram.diagonal()
    products = weight @ normalized
    normalized.fill_diagonal_(0)
    values = weight.clone()
    for rounded in kinds:
        estimate, moved = values @ normalized, values.clone()
        for j in range(weight.shape[1]):
            beta = products[:, j] - estimate[:, j] + moved[:, :j] @ normalized[:j, j]
            if rounded:
                beta = (((beta / scale).round() + zero_point).clamp(0, levels) - zero_point) * scale
            values[:, j] = beta
            moved[:, j] -= beta
    return values
