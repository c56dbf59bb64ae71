# SPDX-License-Identifier: Apache-2.0
"""GPTQ (arXiv 2210.17323) on a grid that is already there: codes by one pass of error feedback.

With Gram matrix S = X X^T, damped on the diagonal, and U the upper Cholesky factor of its inverse (``S^-1 = U^T U``), the
columns are rounded in order and each error is spread over the columns that are still free (Algorithm 1):

    q_j = Q(w_j),    e_j = (w_j - q_j) / U_jj,    w_k <- w_k - e_j U_jk   for k > j

Columns go one by one only inside a block of 128; the errors of a whole block reach the columns after it in one product.

Differences from the published code: the grid is given (static), so a group's grid never depends on weights that were
already moved; dead inputs (S_jj below 1e-8 of the mean) round to the nearest instead of to zero; damping that does not
suffice is raised tenfold, twice, before giving up.

Shapes: ``o`` output features, ``i`` input features, ``G`` groups. Weights are worked on transposed, ``[i, o]``, so that a
column is contiguous.
"""

import torch
from torch import Tensor

from omniq.errors import UserError
from omniq.kernels.coordinate_descent import DEAD

_TRIES = 3  # the damping asked for, then ten and a hundred times as much


def gptq(
    weight: Tensor,
    gram: Tensor,
    scale: Tensor,
    zero_point: Tensor,
    bits: int,
    *,
    group_index: Tensor | None = None,
    damping: float = 0.01,
    act_order: bool = False,
    block: int = 128,
) -> Tensor:
    """Codes of a layer.

    Args:
        weight: ``[o, i]``; gram: ``[i, i]``, symmetric. All arithmetic is done in the dtype of ``gram``.
        scale, zero_point: ``[o, G]``.
        bits: of a code.
        group_index: group of each column, int64 ``[i]``; by default equal runs of neighbours.
        damping: added to the diagonal, as a share of its mean (0.01 in the paper's section 4).
        act_order: visit the columns by descending S_jj; every column keeps the grid of its own group.
        block: columns between two large products (128 in the paper).

    Returns:
        uint8 codes ``[o, i]``, in the order of ``weight``.

    Raises:
        UserError: the Gram matrix is not finite, or not positive definite with a hundred times the damping.
    """
    dtype, width = gram.dtype, weight.shape[1]
    if group_index is None:
        group_index = torch.arange(width, device=weight.device) // (width // scale.shape[1])
    order = gram.diagonal().argsort(descending=True, stable=True) if act_order else None
    if order is not None:
        weight, gram, group_index = weight[:, order], gram[order][:, order], group_index[order]
    factor = inverse_factor(gram, damping)
    work = weight.to(dtype).t().clone(memory_format=torch.contiguous_format)  # [i, o]
    scale, zero_point = scale.to(dtype).t().contiguous(), zero_point.to(dtype).t().contiguous()  # [G, o]
    codes = torch.empty(work.shape, dtype=torch.uint8, device=weight.device)
    for start in range(0, width, block):
        here = slice(start, min(start + block, width))
        group = group_index[here]
        errors = _round_block(work[here], factor[here, here], scale[group], zero_point[group], 2**bits - 1, codes[here])
        work[here.stop :].addmm_(factor[here, here.stop :].t(), errors, alpha=-1)
    if order is not None:
        codes[order] = codes.clone()
    return codes.t()


def _round_block(work: Tensor, factor: Tensor, scale: Tensor, zero_point: Tensor, levels: int, codes: Tensor) -> Tensor:
    """The columns of one block in order.

    Args:
        work: weights as they are by now, ``[n, o]``; factor: ``[n, n]``; scale, zero_point: ``[n, o]``; codes: ``[n, o]``,
            written to.

    Returns:
        the errors ``e``, ``[n, o]``.
    """
    errors = torch.empty_like(work)
    for t in range(work.shape[0]):
        w = torch.addmv(work[t], errors[:t].t(), factor[:t, t], alpha=-1) if t else work[t]
        q = (w / scale[t]).round_().add_(zero_point[t]).clamp_(0, levels)
        codes[t] = q.to(torch.uint8)
        torch.sub(w, q.sub_(zero_point[t]).mul_(scale[t]), out=errors[t])
        errors[t] /= factor[t, t]
    return errors


def inverse_factor(gram: Tensor, damping: float) -> Tensor:
    """Upper Cholesky factor U of the inverse of the damped Gram matrix, ``[i, i]``.

    Dead inputs become unit vectors: they neither give nor take an error.

    Raises:
        UserError: see ``gptq``.
    """
    diagonal = gram.diagonal()
    mean = diagonal.mean()
    if not torch.isfinite(gram).all():
        bad = int((~torch.isfinite(gram)).any(1).sum())
        raise UserError(f"the Gram matrix is not finite in {bad} of {len(gram)} inputs: look for bad calibration samples")
    live = diagonal > DEAD * mean
    clean = gram * live * live[:, None]
    for attempt in range(_TRIES):
        ridge = torch.where(live, damping * 10**attempt * mean, 1.0)
        lower, failed = torch.linalg.cholesky_ex(clean + ridge.diag())
        if not failed:
            # S = L L^T, so S^-1 = L^-T L^-1; its upper factor is the Cholesky factor of that product.
            upper, failed = torch.linalg.cholesky_ex(torch.cholesky_inverse(lower), upper=True)
        if not failed:
            return upper
    raise UserError(
        f"the Gram matrix of {len(gram)} inputs is not positive definite with damping {damping:g} nor with a hundred times "
        "as much: use more calibration samples or a larger damping"
    )
