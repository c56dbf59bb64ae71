# SPDX-License-Identifier: Apache-2.0
"""A quantized model as a function of relative changes: all blocks on the device, or one block at a time.

Both compute the same loss and the same gradients:

    y_0 = embeddings,   y_{l+1} = F_l(y_l; changes_l),   loss = KL(y_L)

``ResidentModel`` leaves the gradient to autograd. ``StreamedModel`` computes it for all samples in two passes over the
blocks, with one block in memory: forward, it keeps ``y_l`` of every block; back, it runs every block again with
gradients and sends ``dLoss/dy_{l+1}`` through it.

Shapes: ``n`` samples, ``t`` tokens of a sample, ``h`` hidden size.
"""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from omniq.blocks.activation_hooks import attach
from omniq.blocks.placement import gather_samples
from omniq.calibration.distillation import CHUNK, divergence
from omniq.calibration.model_task import ModelTask
from omniq.calibration.settings import Memory
from omniq.calibration.tunable_block import TunableBlock
from omniq.distributed import collectives
from omniq.distributed.memory import free_memory

Changes = Sequence[Mapping[str, Tensor]]

_LOGITS = 6  # temporary tensors of CHUNK logits in the loss
_KEPT = 28  # numbers per token and hidden unit that autograd keeps for a gated block, measured on LLaMA


def is_streamed(task: ModelTask, codes: int, batch_size: int, memory: Memory) -> bool:
    """Return whether one block at a time is on the device, as the user asks or as the free memory permits.

    The estimate for all blocks and one batch counts a byte for each code, the dequantized weights, the tensors that
    autograd keeps, and the logits of one chunk.

    Args:
        task: the blocks and streams.
        codes: number of quantized weights.
        batch_size: samples per step.
        memory: the wish of the user.

    Raises:
        UserError: ``memory`` is ``model``, and the model does not fit.
    """
    size = task.inputs.element_size()
    kept = len(task.layouts) * batch_size * task.inputs.shape[1] * task.inputs.shape[2] * _KEPT * size
    needed = codes * (1 + size) + kept + _LOGITS * 4 * CHUNK
    free = free_memory(task.device)
    if memory == "model" and not collectives.all_ranks(needed <= free):
        raise collectives.error_on_rank0(
            f"stages: EndToEnd.memory model: the whole model needs about {needed / 2**30:.1f} GiB, and "
            f"{free / 2**30:.1f} GiB are free on {task.device}: set memory to block, or lower batch_size"
        )
    return memory == "block" or (memory == "auto" and not collectives.all_ranks(needed < 0.6 * free))


def open_block(task: ModelTask, index: int, codes: bool) -> TunableBlock:
    """Make the tunable block of an index, which computes on quantized activations as the exported model does."""
    block, result = task.block(index), task.read(index)
    attach(block, task.layouts[index], task.activations, result.linears)
    return TunableBlock(block, result, codes, task.export_dtype)


class ResidentModel:
    """All blocks on the device.

    Args:
        task: the blocks and streams.
        codes: codes are learned, too.
    """

    def __init__(self, task: ModelTask, codes: bool) -> None:
        self.task = task
        self.blocks = [open_block(task, index, codes) for index in range(len(task.layouts))]

    def loss(self, hidden: Tensor, targets: Tensor, changes: Changes) -> Tensor:
        """Return the mean KL in nats, differentiable in ``changes``.

        Args:
            hidden: embeddings of some samples, ``[batch, t, h]``, on the device.
            targets: the last hidden states of the full-precision model on these samples, of the same shape.
            changes: relative changes of each block.
        """
        for block, kwargs, change in zip(self.blocks, self.task.kwargs, changes, strict=True):
            hidden = block.forward(hidden, kwargs, change)
        return divergence(hidden, targets, self.task.head, self.task.vocabulary)

    @torch.no_grad()
    def held_out(self, changes: Changes) -> Tensor:
        """Return the mean KL of the held-out samples of all processes, float64."""
        task = self.task
        total = torch.zeros((), dtype=torch.float64, device=task.device)
        with task.precision():
            for index in range(task.samples, len(task.inputs)):
                sample = slice(index, index + 1)
                hidden, targets = (
                    gather_samples(stream, sample, task.device) for stream in (task.inputs, task.targets)
                )
                total += self.loss(hidden, targets, changes).double()
        return collectives.all_reduce_sum(total) / (task.held_out * collectives.world_size())


class StreamedModel:
    """One block on the device at a time.

    Args:
        task: the blocks and streams.
        codes: codes are learned, too.
        batch: samples per forward.
    """

    def __init__(self, task: ModelTask, codes: bool, batch: int = 1) -> None:
        self.task, self.codes, self.batch = task, codes, batch
        shape, dtype = tuple(task.inputs.shape), task.inputs.dtype
        self.inputs = [task.inputs, *(task.placement.empty(shape, dtype) for _ in task.layouts)]
        # The gradient of the sum over samples and tokens: in float16, that of the mean would vanish.
        self.gradient = task.placement.empty((task.samples, *shape[1:]), torch.float32)

    def gradients(self, changes: Changes) -> tuple[Tensor, Tensor]:
        """Add the gradient of the mean KL to the parameters of ``changes``.

        Args:
            changes: relative changes, differentiable in the parameters.

        Returns:
            The mean KL in nats of this process's samples, and of the held-out samples of all processes.
        """
        with self.task.precision():
            for index, change in enumerate(changes):
                self._forward(index, change)
            loss, held_out = self._head()
            found: list[tuple[Tensor, Tensor]] = []
            for index in reversed(range(len(changes))):
                found += self._backward(index, changes[index])
        torch.autograd.backward([value for value, _ in found], [gradient for _, gradient in found])
        return loss, held_out

    @torch.no_grad()
    def _forward(self, index: int, change: Mapping[str, Tensor]) -> None:
        task, block = self.task, open_block(self.task, index, self.codes)
        for samples in self._batches(len(task.inputs)):
            hidden = gather_samples(self.inputs[index], samples, task.device)
            self.inputs[index + 1][samples].copy_(block.forward(hidden, task.kwargs[index], change), non_blocking=True)
        self._wait()

    def _head(self) -> tuple[Tensor, Tensor]:
        """Compute both losses, and the gradient of the sum over samples and tokens in the last hidden states."""
        task = self.task
        losses = []
        for samples in self._batches(len(task.inputs), 1):
            learned = samples.start < task.samples
            hidden = gather_samples(self.inputs[-1], samples, task.device).requires_grad_(learned)
            targets = gather_samples(task.targets, samples, task.device)
            loss = divergence(hidden, targets, task.head, task.vocabulary)
            if learned:
                (gradient,) = torch.autograd.grad(loss, hidden, torch.full_like(loss, hidden.shape[1]))
                self.gradient[samples].copy_(gradient, non_blocking=True)
            losses.append(loss.detach().double())
        self._wait()
        held_out = torch.stack(losses[task.samples :]).sum()
        total = collectives.all_reduce_sum(held_out) / (task.held_out * collectives.world_size())
        return torch.stack(losses[: task.samples]).mean(), total

    def _backward(self, index: int, change: Mapping[str, Tensor]) -> list[tuple[Tensor, Tensor]]:
        """Send the gradient through one block; return the relative changes with their gradients of the mean."""
        task, block = self.task, open_block(self.task, index, self.codes)
        leaves = {key: value.detach().clone().requires_grad_() for key, value in change.items()}
        for samples in self._batches(task.samples):
            hidden = gather_samples(self.inputs[index], samples, task.device).requires_grad_()
            output = block.forward(hidden, task.kwargs[index], leaves)
            gradient = gather_samples(self.gradient, samples, task.device)
            output.backward(gradient.to(output.dtype))
            if index and hidden.grad is not None:
                self.gradient[samples].copy_(hidden.grad, non_blocking=True)
        self._wait()
        count = task.samples * task.inputs.shape[1]
        return [(change[key], leaf.grad / count) for key, leaf in leaves.items() if leaf.grad is not None]

    def _batches(self, count: int, batch: int | None = None) -> list[slice]:
        size = batch or self.batch
        return [slice(start, min(start + size, count)) for start in range(0, count, size)]

    def _wait(self) -> None:
        """Wait for copies to the host, which do not block."""
        if self.task.device.type == "cuda":
            torch.cuda.synchronize(self.task.device)
