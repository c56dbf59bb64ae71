# SPDX-License-Identifier: Apache-2.0
"""Learned clipping of the paper in float64: the reference for the stage.

Equations and AdamW written out, straight-through rounding by ``detach``, nothing of omniq in the arithmetic.
"""

import copy

import lightning as L
import torch
from lightning.pytorch.callbacks import Callback
from torch import Tensor
from torch.func import functional_call

from omniq.calibration.task import BlockTask
from omniq.stages.modules.omniquant import OmniQuantModule


class Plain:
    """Learned clipping of a block in float64 (arXiv 2308.13137, equations 1 to 3), one sample a step."""

    def __init__(self, task: BlockTask, start: dict[str, tuple[Tensor, Tensor]] | None = None) -> None:
        (grid,) = set(task.grids.values())
        self.bits, self.symmetric = grid.bits, grid.symmetric
        self.block = copy.deepcopy(task.block).double()
        self.inputs, self.targets = task.inputs.double(), [task.targets.double()]
        rotary = {"position_embeddings": tuple(part.double() for part in task.kwargs["position_embeddings"])}
        self.kwargs = {**task.kwargs, **rotary}
        self.groups, self.logits = {}, {}
        for name in task.layout.linears:
            weight = self.block.get_submodule(name).weight
            width = weight.shape[1] if grid.group_size == -1 else grid.group_size
            self.groups[name] = weight.detach().reshape(-1, width)  # [o G, g]
            upper, lower = start[name] if start else (torch.full((len(self.groups[name]), 1), 4.0),) * 2
            self.logits[name] = [upper.double().reshape(-1, 1).clone(), lower.double().reshape(-1, 1).clone()]
        self.parameters = [logit.requires_grad_() for pair in self.logits.values() for logit in pair]
        self.moments = [(torch.zeros_like(each), torch.zeros_like(each)) for each in self.parameters]
        self.steps = 0

    def quantized(self, name: str) -> Tensor:
        w, (upper, lower) = self.groups[name], self.logits[name]
        levels = 2**self.bits - 1
        high = torch.sigmoid(upper) * w.max(1, keepdim=True).values.clamp(min=0)
        low = torch.sigmoid(lower) * w.min(1, keepdim=True).values.clamp(max=0)
        if self.symmetric:
            scale, zero = 2 * torch.maximum(high, -low) / levels, torch.tensor(2.0 ** (self.bits - 1))
        else:
            scale = (high - low) / levels
            zero = torch.round(-low / scale).detach()
        position = w / scale
        rounded = position + (torch.round(position) - position).detach()
        codes = torch.clamp(rounded + zero, 0, levels)
        return ((codes - zero) * scale).reshape(self.block.get_submodule(name).weight.shape)

    def loss(self, sample: int) -> Tensor:
        weights = {f"{name}.weight": self.quantized(name) for name in self.groups}
        output = functional_call(self.block, weights, (self.inputs[sample : sample + 1],), self.kwargs)
        output = output[0] if isinstance(output, tuple) else output
        return sum(((output - targets[sample]) ** 2).mean() for targets in self.targets)

    def step(self, sample: int, rate: float) -> float:
        """One AdamW step (no decay); returns the loss before it."""
        loss = self.loss(sample)
        self.steps += 1
        with torch.no_grad():
            for grad, parameter, (first, second) in zip(
                torch.autograd.grad(loss, self.parameters), self.parameters, self.moments, strict=True
            ):
                first.mul_(0.9).add_(0.1 * grad)
                second.mul_(0.999).add_(0.001 * grad**2)
                change = first / (1 - 0.9**self.steps)
                parameter -= rate * change / ((second / (1 - 0.999**self.steps)).sqrt() + 1e-8)
        return loss.item()

    def train(self, order: list[int], rates: float | list[float] = 1e-2) -> list[float]:
        rates = [rates] * len(order) if isinstance(rates, float) else rates
        return [self.step(sample, rate) for sample, rate in zip(order, rates, strict=True)]

    def assert_equals(self, module: OmniQuantModule) -> None:
        """Measured: 3.5e-6 at most."""
        for name, (upper, lower) in self.logits.items():
            clip = module.clip(name)
            for ours, theirs in ((clip.upper, upper), (clip.lower, lower)):
                torch.testing.assert_close(ours.detach().double().reshape(-1, 1), theirs.detach(), rtol=0, atol=2e-5)


def assert_losses(ours: list[float], theirs: list[float]) -> None:
    """Measured: 4e-7 at most."""
    torch.testing.assert_close(torch.tensor(ours).double(), torch.tensor(theirs).double(), rtol=3e-6, atol=0)


class Rates(Callback):
    """The rate of every optimizer step."""

    def __init__(self) -> None:
        self.seen: list[float] = []

    def on_train_start(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        trainer.optimizers[0].register_step_pre_hook(
            lambda optimizer, *_: self.seen.append(optimizer.param_groups[0]["lr"])
        )
