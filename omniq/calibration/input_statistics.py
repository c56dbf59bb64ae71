# SPDX-License-Identifier: Apache-2.0
"""Statistics of the inputs of a linear: sums over tokens, the range, or the inputs themselves.

Sums within a sample are in float32; sums over samples are in float64. A float64 sum of so few numbers of similar size
is exact, so the result depends neither on their order nor on how processes share them. A Gram matrix is in float32
throughout, with exact products of half-precision inputs. The block may run in the half precision of the Trainer; its
statistics never do (``without_autocast``).

Shapes: ``s`` samples and ``t`` tokens of a sample in a batch, ``i`` input features, ``o`` output features.
"""

from abc import ABC, abstractmethod
from contextlib import AbstractContextManager

import torch
from torch import Tensor

from omniq.distributed import collectives


class Statistic(ABC):
    """A statistic of an input: its value for a batch, and how batches and processes combine (a sum by default)."""

    name = "Gram matrix"  # in error messages

    @abstractmethod
    def of(self, x: Tensor, weights: Tensor | None) -> Tensor:
        """Compute the statistic of one batch.

        Args:
            x: the inputs, ``[s, t, i]``; ``t`` may be 0.
            weights: weights of the tokens, ``[s, t]``; None for equal weights.
        """

    def add(self, total: Tensor, new: Tensor) -> Tensor:
        """Combine the statistics of two batches; in place, because a Gram matrix may be large."""
        return total.add_(new)

    def reduce(self, total: Tensor) -> Tensor:
        """Combine the statistics of all processes."""
        return collectives.all_reduce_sum(total)


class InputGram(Statistic):
    """``sum_t w_t x_t x_t^T``, float32 ``[i, i]``."""

    def of(self, x: Tensor, weights: Tensor | None) -> Tensor:
        return gram_of(x.flatten(0, 1), None if weights is None else weights.flatten())


class InputSquares(Statistic):
    """``sum_t w_t x_t^2``, float64 ``[i]``: the diagonal of the Gram matrix."""

    def of(self, x: Tensor, weights: Tensor | None) -> Tensor:
        square = x.float().square()
        return (square if weights is None else square * weights.unsqueeze(-1)).sum(1).double().sum(0)


class InputMagnitudes(Statistic):
    """``sum_t |x_t|``, float64 ``[i]``."""

    name = "mean magnitude"

    def of(self, x: Tensor, weights: Tensor | None) -> Tensor:
        return x.float().abs().sum(1).double().sum(0)


class InputRange(Statistic):
    """The smallest and the largest value of each channel, float32 ``[2, i]``."""

    name = "range of its inputs"

    def of(self, x: Tensor, weights: Tensor | None) -> Tensor:
        if not x.numel():
            return torch.tensor([[torch.inf], [-torch.inf]], device=x.device).expand(2, x.shape[-1]).contiguous()
        lo, hi = x.flatten(0, 1).aminmax(dim=0)
        return torch.stack([lo.float(), hi.float()])

    def add(self, total: Tensor, new: Tensor) -> Tensor:
        return torch.stack([total[0].minimum(new[0]), total[1].maximum(new[1])])

    def reduce(self, total: Tensor) -> Tensor:
        return torch.stack([-collectives.all_reduce_max(-total[0]), collectives.all_reduce_max(total[1].clone())])


class InputRows(Statistic):
    """The inputs themselves, float32 ``[rows, i]``; each process keeps its own."""

    name = "input"

    def of(self, x: Tensor, weights: Tensor | None) -> Tensor:
        return x.flatten(0, 1).float()

    def add(self, total: Tensor, new: Tensor) -> Tensor:
        return torch.cat([total, new])

    def reduce(self, total: Tensor) -> Tensor:
        return total


def without_autocast(x: Tensor) -> AbstractContextManager[None]:
    """Context in which products on the device of ``x`` keep its dtype, whatever the precision of the Trainer.

    Training steps and forwards of a stream run in autocast, which would round a Gram matrix to 8 or 11 bits.
    """
    return torch.autocast(x.device.type, enabled=False)


def gram_of(x: Tensor, weights: Tensor | None = None) -> Tensor:
    """``sum_t w_t x_t x_t^T`` of inputs ``[tokens, i]`` with weights ``[tokens]``, float32 ``[i, i]``.

    Without weights, half-precision inputs are multiplied exactly and summed in float32.
    """
    with without_autocast(x):
        if weights is None and x.is_cuda and x.dtype in (torch.float16, torch.bfloat16):
            return torch.mm(x.t(), x, out_dtype=torch.float32)
        x = x.float() if weights is None else x.float() * weights.sqrt().unsqueeze(1)
        return x.t() @ x


def powers_of(weight: Tensor, gram: Tensor) -> Tensor:
    """``w S w^T`` of each row of ``[o, i]``, ``[o]``: the power (sum of squares) of each output of ``W x``."""
    with without_autocast(weight):
        return (weight @ gram).mul_(weight).sum(1)


def power_of(weight: Tensor, gram: Tensor) -> Tensor:
    """``tr(W S W^T)`` of ``[o, i]`` and ``[i, i]``, a scalar: the power of ``W x``, summed over its outputs."""
    return powers_of(weight, gram).sum()


def relative_error(error: Tensor, power: Tensor) -> Tensor:
    """``error / power``; the error itself where the power is zero (weights of zero, dead inputs)."""
    return error / torch.where(power > 0, power, 1.0)
