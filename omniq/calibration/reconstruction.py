# SPDX-License-Identifier: Apache-2.0
"""Learning by block-wise reconstruction: what every stage with gradients shares.

For a block ``F`` and inputs ``X`` (the quantized stream), over parameters ``p`` that say how weights are quantized:

    minimise   || F(W, X_fp) - F(Q(W; p), X) ||^2                  (mean over elements, or relative to each token)

The block is the untouched Hugging Face module: its weights are replaced for the length of one call by fake-quantized
ones (``torch.func.functional_call``). One AdamW step for each batch, no weight decay.

The augmented loss adds ``|| F(W, X) - F(Q(W), X) ||^2``. With ``a`` and ``b`` the two targets,
``|a - y|^2 + |b - y|^2 = 2 |(a + b)/2 - y|^2 + |a - b|^2 / 2``, so omniq averages them once and trains on one target;
the constant is added so that the loss reads as the two-term one.

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
from omniq.storage.block_result import BlockResult

Schedule = Literal["constant", "cosine"]


class Reconstruction(Stage):
    """Settings that all stages with gradients share.

    Args:
        epochs: passes over the samples for each block.
        batch_size: samples a step; of several processes, of each.
        augmented_loss: add the distance to the full-precision block on the quantized stream.
        schedule: ``constant`` or ``cosine``, which decays the rate to zero over the block.
        shuffle: draw a new order of samples each epoch.
        token_weights: how much each token counts in the loss.

    Raises:
        UserError: no epochs or an empty batch.
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
    """A block whose quantization is being learned.

    Args:
        task: the block, its streams and its grids.
        settings: of the stage.
    """

    def __init__(self, task: BlockTask, settings: Reconstruction) -> None:
        super().__init__(task)
        self.automatic_optimization = False  # so that the update can be one graph
        self.settings = settings
        self.targets = task.targets
        self.gap: Tensor | None = None  # [n]: half the weighted mean square between the two targets of each sample

    @abstractmethod
    def quantized_tensors(self, dtype: torch.dtype | None = None) -> dict[str, Tensor]:
        """The block's tensors by name, weights of linears fake-quantized; differentiable in what is learned.

        Args:
            dtype: of those weights, where autocast would otherwise convert them.
        """

    @abstractmethod
    def learned(self) -> list[dict[str, Any]]:
        """Parameter groups of what is learned, each with its rate."""

    @abstractmethod
    def finish(self) -> BlockResult:
        """Round for the last time."""

    def augment(self) -> None:
        """Average the targets with what the full-precision block makes of the quantized stream."""
        task = self.task
        own = task.run(task.inputs)
        kind, gaps = self.settings.token_weights, []
        for target, other in zip(task.targets, own, strict=True):
            a, b = (each.to(task.device, non_blocking=True) for each in (target, other))  # wherever streams live
            middle = a / 2 + b / 2  # halves first: in float16 the sum may overflow
            gaps.append(weighted_error(a, b, kind, reference=middle) / 2)
            other.copy_(middle)  # in place: a stream may be all that memory holds
        self.gap = torch.stack(gaps).to(task.inputs.device)  # where a step has its indices
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
        """Mean squared error of the quantized block's output, twice it for the average of two targets."""
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
        """The whole update, a CUDA graph where there is a GPU."""
        scaler = getattr(self.trainer.precision_plugin, "scaler", None)
        return OptimizerStep(self.criterion, self.trainer.optimizers[0], scaler)

    @cached_property
    def criterion(self) -> Loss:
        """The loss; compiled, if the run asks for it: once, as blocks are built alike.

        NOTE: for each shape by itself, or a smaller last batch would bring another graph for the full ones, too, and a
        fit that is resumed would get there at another step.
        """
        return torch.compile(self.loss, dynamic=False) if self.task.compile else self.loss

    def _shared_step(self, inputs: Tensor, targets: Tensor) -> Tensor:
        """The update under several processes: Lightning averages the gradients."""
        optimizer = self.optimizers()
        assert isinstance(optimizer, LightningOptimizer)
        optimizer.zero_grad()
        loss = self.criterion(inputs, targets)
        self.manual_backward(loss)
        optimizer.step()
        return loss.detach()

    def on_train_start(self) -> None:
        for group in (group for optimizer in self.trainer.optimizers for group in optimizer.param_groups):
            if isinstance(group["lr"], Tensor):  # as a checkpoint has it, on the CPU: a captured step would never look
                group["lr"] = group["lr"].to(self.task.device)

    def on_train_end(self) -> None:
        """Let go of what only steps need: Lightning would take moments and gradients to the host now."""
        self.step.reset()
        for optimizer in self.trainer.optimizers:
            optimizer.zero_grad()
            optimizer.state.clear()

    def restored(self) -> None:
        self.step.reset()

    def configure_optimizers(self) -> Any:
        groups = self.learned()
        options: dict[str, Any] = {}
        if self.task.device.type == "cuda":  # what a CUDA graph asks for: no number of the update on the host
            options = {"fused": True, "capturable": True}
            groups = [{**group, "lr": torch.tensor(group["lr"], device=self.task.device)} for group in groups]
        optimizer = torch.optim.AdamW(groups, weight_decay=0.0, **options)
        if self.settings.schedule == "constant":
            return optimizer
        decay = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=len(self.loader()))
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": decay, "interval": "step"}}


def module_key(name: str) -> str:
    """Name of a linear's own part in a ModuleDict or ParameterDict, which allow no dots."""
    return name.replace(".", "/")
