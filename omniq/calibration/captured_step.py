# SPDX-License-Identifier: Apache-2.0
"""One optimizer step, replayed as a CUDA graph on a GPU.

A calibration step of a small or medium block consists of hundreds of short kernels. Launched one by one from Python,
they leave the GPU idle most of the time. After a few eager steps, the whole step (forward, loss, backward, AdamW) is
captured once with the batch in fixed buffers. Each later step is two copies and one launch, without synchronisation.

The captured graph reads and writes the optimizer's own state, so Lightning saves and restores it as usual. Code that
replaces tensors of the module or of the optimizer (a guard that restores an earlier state) calls ``reset``; the next
step is then eager again. Every step is eager on the CPU, with several processes, and for a batch of another size.
Results are equal up to the order of sums inside a kernel.
"""

from collections.abc import Callable

import torch
from torch import Tensor
from torch.optim import Optimizer

WARMUP = 3  # eager steps before the capture: lazily created state (Adam's moments, cuBLAS workspaces) must exist then

Loss = Callable[[Tensor, Tensor], Tensor]


class OptimizerStep:
    """Loss, backward and update on one batch.

    Args:
        loss: function of inputs and targets, differentiable in the optimizer's parameters.
        optimizer: must be capturable for a graph, and fused if a scaler is given.
        scaler: scaler of the gradients for float16, or None.
        graph: capture a graph on CUDA; False keeps every step eager.
    """

    def __init__(
        self, loss: Loss, optimizer: Optimizer, scaler: "torch.amp.GradScaler | None" = None, graph: bool = True
    ) -> None:
        self.loss, self.optimizer, self.scaler, self.enabled = loss, optimizer, scaler, graph
        self.reset()

    def reset(self) -> None:
        """Discard the captured graph."""
        self._graph: torch.cuda.CUDAGraph | None = None
        self._eager_steps = 0
        self._shape: torch.Size | None = None  # of the first batch; the last batch of a pass may be smaller
        self._buffers: tuple[Tensor, Tensor] | None = None
        self._result: Tensor | None = None

    def __call__(self, inputs: Tensor, targets: Tensor) -> Tensor:
        """Run one step.

        Args:
            inputs, targets: the batch, on the device.

        Returns:
            the loss before the step, a detached scalar on the device.
        """
        if not (self.enabled and inputs.is_cuda):
            return self._step(inputs, targets)
        self._shape = self._shape or inputs.shape
        if inputs.shape != self._shape:
            return self._step(inputs, targets)
        if self._graph is None:
            self._eager_steps += 1
            if self._eager_steps <= WARMUP:
                return self._on_side_stream(inputs, targets)
            self._capture(inputs, targets)
        assert self._graph is not None
        assert self._buffers is not None
        assert self._result is not None
        self._buffers[0].copy_(inputs)
        self._buffers[1].copy_(targets)
        self._graph.replay()
        return self._result.clone()

    def _step(self, inputs: Tensor, targets: Tensor) -> Tensor:
        self.optimizer.zero_grad(set_to_none=True)
        loss = self.loss(inputs, targets)
        if self.scaler is None:
            loss.backward()
            self.optimizer.step()
        else:
            self.scaler.scale(loss).backward()
            self.scaler.step(self.optimizer)
            self.scaler.update()
        return loss.detach()

    def _on_side_stream(self, inputs: Tensor, targets: Tensor) -> Tensor:
        """Run an eager step on a side stream: the capture reuses its memory, which must not be the default stream's."""
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            loss = self._step(inputs, targets)
        torch.cuda.current_stream().wait_stream(stream)
        return loss

    def _capture(self, inputs: Tensor, targets: Tensor) -> None:
        """Capture one step; the capture does not execute it."""
        self._buffers = (inputs.clone(), targets.clone())
        self.optimizer.zero_grad(set_to_none=True)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            self._result = self._step(*self._buffers)
        self._graph = graph
