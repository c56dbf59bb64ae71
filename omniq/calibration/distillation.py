# SPDX-License-Identifier: Apache-2.0
r"""The loss of a whole model: the KL divergence of its next-token distribution from that of the full-precision model.

For the last hidden states ``y`` of the quantized and ``t`` of the full-precision model, one row for each token, and the
head ``H`` (final norm and output projection) that both share,

    KL = mean over rows of  sum_v p_v (log p_v - log q_v),     p = softmax(H(t)),  q = softmax(H(y))      in nats

The logits of all rows do not fit in memory: 2048 tokens of a vocabulary of 150,000 take 1.2 GB in float32. The loss
and its gradient with respect to ``y`` are therefore computed together, for as many rows at a time as ``CHUNK`` logits.

Shapes: ``...`` samples and tokens, ``h`` hidden size, ``r`` rows, ``v`` vocabulary.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

CHUNK = 2**25
"""Number of logits at a time: 128 MiB in float32, for each of about six temporary tensors."""

Head = Callable[[Tensor], Tensor]
"""Maps hidden states ``[n, t, h]`` to logits ``[n, t, v]``, differentiable."""


def divergence(hidden: Tensor, targets: Tensor, head: Head, vocabulary: int) -> Tensor:
    """Return the mean KL divergence in nats, a scalar that is differentiable in ``hidden``.

    Args:
        hidden: last hidden states of the quantized model, ``[..., h]``.
        targets: last hidden states of the full-precision model, of the same shape.
        head: the final norm and the output projection.
        vocabulary: the number of logits of a row.
    """
    loss: Tensor = _Divergence.apply(hidden, targets, head, max(1, CHUNK // vocabulary))
    return loss


class _Divergence(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, hidden: Tensor, targets: Tensor, head: Head, rows: int) -> Tensor:
        student, teacher = hidden.detach().flatten(0, -2), targets.flatten(0, -2)
        total = torch.zeros((), device=hidden.device)
        gradient = torch.empty_like(student) if hidden.requires_grad else None
        for start in range(0, len(student), rows):
            part = slice(start, start + rows)
            with torch.no_grad():
                wanted = head(teacher[None, part])[0].float().log_softmax(-1)
            chunk = student[part].clone().requires_grad_(gradient is not None)
            with torch.set_grad_enabled(gradient is not None):
                found = head(chunk[None])[0].float().log_softmax(-1)
                loss = (wanted.exp() * (wanted - found)).sum()
            if gradient is not None:
                gradient[part] = torch.autograd.grad(loss, chunk)[0]
            total += loss.detach()
        ctx.rows, ctx.shape = len(student), hidden.shape
        if gradient is not None:
            ctx.save_for_backward(gradient)
        return total / len(student)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor, None, None, None]:
        (gradient,) = ctx.saved_tensors
        scale = (grad_outputs[0] / ctx.rows).to(gradient.dtype)
        return (gradient * scale).view(ctx.shape), None, None, None
