# SPDX-License-Identifier: Apache-2.0
"""The base of all modules that learn by gradients: AdamW on a loss of inputs and targets, one step for each batch.

In one process, the whole update (loss, backward, AdamW) is one CUDA graph on a GPU
(``omniq.calibration.captured_step``). With several processes, Lightning averages the gradients.
"""

from abc import abstractmethod
from functools import cached_property
from typing import Any

import torch
from lightning.pytorch.core.optimizer import LightningOptimizer
from torch import Tensor
from torch.optim.lr_scheduler import LRScheduler

from omniq.calibration.captured_step import Loss, OptimizerStep
from omniq.calibration.pass_module import AnyTask, PassModule
from omniq.calibration.settings import Schedule


class GradientModule(PassModule[AnyTask]):
    """Learns parameters of a task by gradients.

    Args:
        task: the task.
        schedule: ``constant``, or ``cosine`` to decay the learning rates to zero.
    """

    def __init__(self, task: AnyTask, schedule: Schedule) -> None:
        super().__init__(task)
        self.automatic_optimization = False  # so that the update can be one CUDA graph
        self.schedule: Schedule = schedule

    @abstractmethod
    def loss(self, inputs: Tensor, targets: Tensor) -> Tensor:
        """The loss of one batch, a scalar that is differentiable in the learned parameters."""

    @abstractmethod
    def parameter_groups(self) -> list[dict[str, Any]]:
        """The learned parameters in groups for the optimizer, each with its learning rate."""

    @property
    def capturable(self) -> bool:
        """Whether a CUDA graph can hold the update: its operations must not depend on the values of the batch."""
        return True

    @property
    def compiles(self) -> bool:
        """Whether the loss is compiled."""
        return False

    def update(self, inputs: Tensor, targets: Tensor) -> Tensor:
        """Make one step of the optimizer and of the schedule; return the loss before it, a detached scalar."""
        loss = self.step(inputs, targets) if self.trainer.world_size == 1 else self._shared_step(inputs, targets)
        self.advance_schedule()
        return loss

    def advance_schedule(self) -> None:
        """Decay the learning rates by one step."""
        schedule = self.lr_schedulers()
        if isinstance(schedule, LRScheduler):
            schedule.step()

    @cached_property
    def step(self) -> OptimizerStep:
        """The whole update; a CUDA graph on a GPU, unless ``capturable`` is False."""
        scaler = getattr(self.trainer.precision_plugin, "scaler", None)
        return OptimizerStep(self.criterion, self.trainer.optimizers[0], scaler, graph=self.capturable)

    @property
    def steps(self) -> int:
        """Number of steps of the optimizer in the whole fit."""
        return len(self.loader())

    @cached_property
    def criterion(self) -> Loss:
        """The loss, compiled if the run requests it; blocks of equal structure share the compiled code.

        NOTE: ``dynamic=False`` compiles each shape separately. Otherwise a smaller last batch would change the graph of
        full batches too, and a resumed fit would change graphs at another step.
        """
        return torch.compile(self.loss, dynamic=False) if self.compiles else self.loss

    def _shared_step(self, inputs: Tensor, targets: Tensor) -> Tensor:
        """The update with several processes, in which Lightning averages the gradients."""
        optimizer = self.optimizers()
        assert isinstance(optimizer, LightningOptimizer)
        optimizer.zero_grad()
        loss = self.criterion(inputs, targets)
        self.manual_backward(loss)
        optimizer.step()
        return loss.detach()

    def on_train_start(self) -> None:
        for group in (group for optimizer in self.trainer.optimizers for group in optimizer.param_groups):
            if isinstance(group["lr"], Tensor):  # restored to the CPU, where a captured step cannot read it
                group["lr"] = group["lr"].to(self.task.device)

    def on_train_end(self) -> None:
        """Free the state that only steps need; otherwise Lightning would move moments and gradients to the host."""
        self.step.reset()
        for optimizer in self.trainer.optimizers:
            optimizer.zero_grad()
            optimizer.state.clear()

    def restored(self) -> None:
        self.step.reset()

    def configure_optimizers(self) -> Any:
        groups = self.parameter_groups()
        options: dict[str, Any] = {}
        if self.task.device.type == "cuda":  # a CUDA graph requires that no value of the update is on the host
            options = {"fused": True, "capturable": True}
            groups = [{**group, "lr": torch.tensor(float(group["lr"]), device=self.task.device)} for group in groups]
        optimizer = torch.optim.AdamW(groups, weight_decay=0.0, **options)
        if self.schedule == "constant":
            return optimizer
        decay = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=self.steps)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": decay, "interval": "step"}}
