# SPDX-License-Identifier: Apache-2.0
"""Block-wise reconstruction: the base of all stages with gradients.

For a block ``F`` and inputs ``X`` (the quantized stream), over parameters ``p`` of the quantization:

    minimise   || F(W, X_fp) - F(Q(W; p), X) ||^2                  (mean over elements, or relative to each token)

The block is the unmodified Hugging Face module. During one call its weights are replaced by fake-quantized weights
(``torch.func.functional_call``). Each batch is one AdamW step without weight decay.

The augmented loss adds ``|| F(W, X) - F(Q(W), X) ||^2``. For two targets ``a`` and ``b``,
``|a - y|^2 + |b - y|^2 = 2 |(a + b)/2 - y|^2 + |a - b|^2 / 2``. omniq therefore averages the targets once and trains on
the average; the reported loss includes the constant, so that it equals the sum of the two terms.

Shapes: ``n`` samples, ``t`` tokens of a sample, ``h`` hidden size.
"""

from abc import abstractmethod
from functools import cached_property
from typing import Any, Literal

import torch
from lightning.pytorch.core.optimizer import LightningOptimizer
from torch import Tensor
from torch.func import functional_call
from torch.optim.lr_scheduler import LRScheduler

from omniq.blocks.placement import gather_samples
from omniq.calibration.captured_step import Loss, OptimizerStep
from omniq.calibration.loader import PassLoader
from omniq.calibration.module import BlockModule
from omniq.calibration.stage import Stage
from omniq.calibration.task import BlockTask
from omniq.calibration.token_weights import TokenWeights, weighted_error
from omniq.errors import UserError
from omniq.models.experts import LinearExperts
from omniq.storage.block_result import BlockResult

Schedule = Literal["constant", "cosine"]


class Reconstruction(Stage):
    """Settings that all stages with gradients share.

    Args:
        epochs: passes over the samples for each block.
        batch_size: samples per step and process.
        augmented_loss: add the distance to the output of the full-precision block on the quantized stream.
        schedule: ``constant``, or ``cosine`` to decay the learning rate to zero over the block.
        shuffle: draw a new order of the samples for each epoch.
        token_weights: the weight of each token in the loss.

    Raises:
        UserError: ``epochs`` or ``batch_size`` is less than 1.
    """

    def __init__(
        self,
        epochs: int,
        batch_size: int,
        augmented_loss: bool,
        schedule: Schedule,
        shuffle: bool,
        token_weights: TokenWeights,
    ) -> None:
        for name, value in (("epochs", epochs), ("batch_size", batch_size)):
            if value < 1:
                raise UserError(f"stages: {type(self).__name__}.{name} {value} is too small: give 1 or more")
        self.epochs, self.batch_size = epochs, batch_size
        self.augmented_loss, self.schedule, self.shuffle = augmented_loss, schedule, shuffle
        self.token_weights: TokenWeights = token_weights


class ReconstructionModule(BlockModule):
    """Learns the quantization of one block.

    Args:
        task: the block, its streams and its grids.
        settings: the settings of the stage.
    """

    def __init__(self, task: BlockTask, settings: Reconstruction) -> None:
        super().__init__(task)
        self.automatic_optimization = False  # so that the update can be one CUDA graph
        self.settings = settings
        self.targets = task.targets
        self.gap: Tensor | None = None  # [n]: half the weighted mean square between the two targets of each sample

    @abstractmethod
    def quantized_tensors(self, dtype: torch.dtype | None = None) -> dict[str, Tensor]:
        """Tensors of the block by name, with fake-quantized weights; differentiable in the learned parameters.

        Args:
            dtype: dtype of the fake-quantized weights, so that autocast does not convert them.
        """

    @abstractmethod
    def parameter_groups(self) -> list[dict[str, Any]]:
        """The learned parameters in groups for the optimizer, each with its learning rate."""

    @abstractmethod
    def finish(self) -> BlockResult:
        """Return the final codes and tensors of the block."""

    def augment(self) -> None:
        """Average the targets with the outputs of the full-precision block on the quantized stream."""
        task = self.task
        own = task.run(task.inputs)
        kind, gaps = self.settings.token_weights, []
        for target, other in zip(task.targets, own, strict=True):
            a, b = (each.to(task.device, non_blocking=True) for each in (target, other))  # streams may be on the host
            middle = a / 2 + b / 2  # halved before the sum, which may overflow in float16
            gaps.append(weighted_error(a, b, kind, reference=middle) / 2)
            other.copy_(middle)  # in place: there may be no memory for another stream
        self.gap = torch.stack(gaps).to(task.inputs.device)  # the device of the sample indices
        self.targets = own

    def loader(self) -> PassLoader:
        settings = self.settings
        order = self.task.seed * 10_007 + self.task.index if settings.shuffle else None
        return PassLoader(len(self.task.inputs), settings.batch_size, settings.epochs, order)

    def forward(self, hidden: Tensor) -> Tensor:
        """The quantized block's output, ``[batch, t, h]``."""
        dtype = torch.get_autocast_dtype(hidden.device.type) if torch.is_autocast_enabled(hidden.device.type) else None
        tensors = self.quantized_tensors(dtype)
        with self.task.quantized_activations():
            output = functional_call(self.task.block, tensors, (hidden,), dict(self.task.kwargs))
        return output[0] if isinstance(output, tuple) else output

    def loss(self, inputs: Tensor, targets: Tensor) -> Tensor:
        """Mean squared error of the quantized block's output; doubled if the target is the average of two."""
        error = weighted_error(self(inputs), targets, self.settings.token_weights)
        return error if self.gap is None else 2 * error

    def training_step(self, indices: Tensor) -> None:
        inputs, targets = (
            gather_samples(stream, indices, self.task.device) for stream in (self.task.inputs, self.targets)
        )
        loss = self.step(inputs, targets) if self.trainer.world_size == 1 else self._shared_step(inputs, targets)
        if self.gap is not None:
            loss = loss + self.gap[indices.to(self.gap.device)].mean()
        self.track("loss", loss)
        schedule = self.lr_schedulers()
        if isinstance(schedule, LRScheduler):
            schedule.step()

    @cached_property
    def step(self) -> OptimizerStep:
        """The whole update; a CUDA graph on a GPU, unless the number of tokens of an expert depends on the batch."""
        scaler = getattr(self.trainer.precision_plugin, "scaler", None)
        routed = any(isinstance(module, LinearExperts) for module in self.task.block.modules())
        return OptimizerStep(self.criterion, self.trainer.optimizers[0], scaler, graph=not routed)

    @cached_property
    def criterion(self) -> Loss:
        """The loss, compiled if the run requests it; blocks of equal structure share the compiled code.

        NOTE: ``dynamic=False`` compiles each shape separately. Otherwise a smaller last batch would change the graph of
        full batches too, and a resumed fit would change graphs at another step.
        """
        return torch.compile(self.loss, dynamic=False) if self.task.compile else self.loss

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
            groups = [{**group, "lr": torch.tensor(group["lr"], device=self.task.device)} for group in groups]
        optimizer = torch.optim.AdamW(groups, weight_decay=0.0, **options)
        if self.settings.schedule == "constant":
            return optimizer
        decay = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=len(self.loader()))
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": decay, "interval": "step"}}


def module_key(name: str) -> str:
    """Key of a linear in a ModuleDict or ParameterDict, which allow no dots."""
    return name.replace(".", "/")
