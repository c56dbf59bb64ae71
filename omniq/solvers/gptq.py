# SPDX-License-Identifier: Apache-2.0
"""GPTQ (arXiv 2210.17323, Algorithm 1) on a given grid: codes by one pass of error feedback.

With Gram matrix S = X X^T (GPTQ calls 2 S the Hessian), damped on the diagonal, and U the upper Cholesky factor of its
inverse (``S^-1 = U^T U``), columns are rounded in order, and each error is spread over the columns that follow:

    q_j = Q(w_j),    e_j = (w_j - q_j) / U_jj,    w_k <- w_k - e_j U_jk   for k > j

**Steps**: (1) order the columns by descending S_jj (``act_order``, optional); (2) compute U; (3) for each block of 128
columns, visit its columns one by one; (4) apply the errors of the block to all later columns in one product.

**Deviations from the published code**: the grid is given (static), so a group's grid never depends on weights that were
already changed; dead inputs (S_jj below 1e-8 of the mean) round to the nearest instead of to zero; coordinates that a
sparse part stores (``mask``) are not rounded, so they have no error of their own and absorb the errors of others; if
the damping does not suffice, it is raised tenfold, up to twice and with a warning, before the layer is refused.

Shapes: ``o`` output features, ``i`` input features, ``G`` groups, ``n`` columns of a block. Weights are stored
transposed, ``[i, o]``, so that a column is contiguous.
"""

import logging

import torch
from torch import Tensor

from omniq.errors import UserError
from omniq.kernels.layer_problem import check_finite, dead_columns, groups_of
from omniq.solvers.solution import LayerSolution

log = logging.getLogger("omniq")

_TRIES = 3  # the given damping, then ten times and a hundred times as much


def gptq(
    weight: Tensor,
    gram: Tensor,
    scale: Tensor,
    zero_point: Tensor,
    bits: int,
    *,
    group_index: Tensor | None = None,
    mask: Tensor | None = None,
    damping: float = 0.01,
    act_order: bool = False,
    block: int = 128,
) -> LayerSolution:
    """Round a layer.

    Args:
        weight: ``[o, i]``; gram: ``[i, i]``, symmetric, whose dtype all arithmetic has; scale, zero_point: ``[o, G]``.
        group_index: group of each column, int64 ``[i]``; by default equal runs of neighbours.
        mask: bool ``[o, i]``, True where a sparse part stores the weight, as changed by the errors of earlier columns.
            Its code stands for zero.
        damping: added to the diagonal, as a fraction of its mean (0.01 in the paper, section 4).
        act_order: visit the columns by descending S_jj; each column keeps the grid of its own group.
        block: columns between two large products (128 in the paper).

    Raises:
        UserError: the Gram matrix is not finite, or not positive definite with a hundred times the damping.
    """
    group_index = groups_of(weight, scale) if group_index is None else group_index
    values, masked = weight.to(gram.dtype).t(), None if mask is None else mask.t()  # [i, o]
    order = gram.diagonal().argsort(descending=True, stable=True) if act_order else None
    if order is not None:
        values, gram, group_index = values[order], gram[order][:, order], group_index[order]
        masked = None if masked is None else masked[order]
    scale, zero_point = scale.to(gram.dtype).t(), zero_point.to(gram.dtype).t()  # [G, o]
    factor = inverse_factor(gram, damping)
    codes, values = _round(values, factor, scale, zero_point, 2**bits - 1, group_index, masked, block)
    if order is not None:
        back = order.argsort()
        codes, values = codes[back], values[back]
    sparse = None if mask is None else values.t() * mask
    return LayerSolution(codes.t(), scale.t(), zero_point.t(), sparse)


def _round(
    weight: Tensor,
    factor: Tensor,
    scale: Tensor,
    zero_point: Tensor,
    max_code: int,
    group_index: Tensor,
    mask: Tensor | None,
    block: int,
) -> tuple[Tensor, Tensor]:
    """Steps 3 and 4: codes and final values, both ``[i, o]``, of columns in the order in which they are visited."""
    values = weight.clone(memory_format=torch.contiguous_format)
    codes = torch.empty(values.shape, dtype=torch.uint8, device=weight.device)
    for start in range(0, len(values), block):
        here = slice(start, min(start + block, len(values)))
        group, free = group_index[here], None if mask is None else mask[here]
        errors = _round_block(
            values[here], codes[here], factor[here, here], (scale[group], zero_point[group], max_code), free
        )
        values[here.stop :].addmm_(factor[here, here.stop :].t(), errors, alpha=-1)
    return codes, values


def _round_block(
    values: Tensor, codes: Tensor, factor: Tensor, grid: tuple[Tensor, Tensor, int], free: Tensor | None
) -> Tensor:
    """The columns of one block in order.

    Args:
        values: ``[n, o]``, weights changed by earlier blocks; overwritten with their final values.
        codes: ``[n, o]``, written to; factor: ``[n, n]``.
        grid: scale and zero point ``[n, o]``, and the largest code.
        free: coordinates that are not rounded, bool ``[n, o]``, or None.

    Returns:
        the errors ``e``, ``[n, o]``.
    """
    scale, zero_point, max_code = grid
    errors = torch.empty_like(values)
    for t in range(values.shape[0]):
        w = torch.addmv(values[t], errors[:t].t(), factor[:t, t], alpha=-1) if t else values[t].clone()
        q = (w / scale[t]).round_().add_(zero_point[t]).clamp_(0, max_code)
        q = q if free is None else torch.where(free[t], zero_point[t], q)
        codes[t] = q.to(torch.uint8)
        q.sub_(zero_point[t]).mul_(scale[t])
        values[t] = q if free is None else torch.where(free[t], w, q)
        torch.div(w - values[t], factor[t, t], out=errors[t])
    return errors


def inverse_factor(gram: Tensor, damping: float) -> Tensor:
    """Upper Cholesky factor U of the inverse of the damped Gram matrix, ``[i, i]``: ``S^-1 = U^T U``.

    Dead inputs become unit vectors, which neither pass on nor absorb errors.

    Raises:
        UserError: see ``gptq``.
    """
    check_finite(gram)
    live = ~dead_columns(gram)
    clean = gram * live * live[:, None]
    shares = [damping * 10**attempt for attempt in range(_TRIES)] if damping else [0.0]
    for share in shares:
        ridge = torch.where(live, share * gram.diagonal().mean(), 1.0)
        lower, failed = torch.linalg.cholesky_ex(clean + ridge.diag())
        if not failed:
            upper, failed = torch.linalg.cholesky_ex(torch.cholesky_inverse(lower), upper=True)
        if not failed:
            if share != damping:
                log.warning("damping %g does not make %d inputs positive definite: %g does", damping, len(gram), share)
            return upper
    more = ", nor with a hundred times as much" if damping else ""
    raise UserError(
        f"the Gram matrix of {len(gram)} inputs is not positive definite with damping {damping:g}{more}: use more "
        "calibration samples or a larger damping"
    )
