# SPDX-License-Identifier: Apache-2.0
"""One optimizer step, replayed as a CUDA graph where there is a GPU.

A calibration step of a small or medium block is hundreds of short kernels; launched one by one from Python they leave
the GPU idle most of the time. After a few eager steps the whole of it (forward, loss, backward, AdamW) is captured once
with the batch in fixed buffers, and from then on a step is two copies and one launch, with nothing waited for.

The captured graph reads and writes the optimizer's own state, so Lightning saves and restores it as always; whoever
replaces tensors of the module or the optimizer (a guard going back to a good state) calls ``reset`` and the next step
is eager again. On the CPU, under several processes, and for a batch of another size every step is eager; numbers are
the same up to the order of sums inside a kernel.
"""

from collections.abc import Callable

import torch
from torch import Tensor
from torch.optim import Optimizer

WARMUP = 3  # eager steps before the capture: lazily made state (Adam's moments, cuBLAS workspaces) must exist by then

Loss = Callable[[Tensor, Tensor], Tensor]


class OptimizerStep:
    """Loss, backward and update on one batch.

    Args:
        loss: of inputs and targets; differentiable in the optimizer's parameters.
        optimizer: for a graph it must be capturable (and fused, if a scaler is given).
        scaler: of the gradients in float16, or None.
        graph: capture on CUDA; False keeps every step eager.
    """

    def __init__(
        self, loss: Loss, optimizer: Optimizer, scaler: "torch.amp.GradScaler | None" = None, graph: bool = True
    ) -> None:
        self.loss, self.optimizer, self.scaler, self.enabled = loss, optimizer, scaler, graph
        self.reset()

    def reset(self) -> None:
        """Forget the captured graph."""
        self._graph: torch.cuda.CUDAGraph | None = None
        self._eager_steps = 0
        self._shape: torch.Size | None = None  # of the first batch; the last one of a pass may be smaller
        self._buffers: tuple[Tensor, Tensor] | None = None
        self._result: Tensor | None = None

    def __call__(self, inputs: Tensor, targets: Tensor) -> Tensor:
        """Do one step.

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
        """Eager, where the capture will run: memory it reuses must not belong to the default stream."""
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            loss = self._step(inputs, targets)
        torch.cuda.current_stream().wait_stream(stream)
        return loss

    def _capture(self, inputs: Tensor, targets: Tensor) -> None:
        """Record one step; recording does not execute it."""
        self._buffers = (inputs.clone(), targets.clone())
        self.optimizer.zero_grad(set_to_none=True)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            self._result = self._step(*self._buffers)
        self._graph = graph
