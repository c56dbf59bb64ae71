# SPDX-License-Identifier: Apache-2.0
"""OmniQuant (arXiv 2308.13137): learn the clipping of every weight of a block against the block's own output.

For a block ``F`` with weights ``W`` and inputs ``X`` (the quantized stream), equation 1 of the paper:

    minimise over the clipping   || F(W, X_fp) - F(Q(W; clipping), X) ||^2        (mean over all elements)

The block is the untouched Hugging Face module: its weights are replaced for the length of one call by fake-quantized
ones (``torch.func.functional_call``). One AdamW step for each batch; the paper's scripts use batches of one sample,
20 epochs (40 at 2 bits), rate 1e-2, no weight decay, constant rate, natural order.

The augmented loss adds ``|| F(W, X) - F(Q(W), X) ||^2``. With ``a`` and ``b`` the two targets,
``|a - y|^2 + |b - y|^2 = 2 |(a + b)/2 - y|^2 + |a - b|^2 / 2``, so omniq averages them once and trains on one target; the
constant is added so that the loss reads as the two-term one.

Deviations from the published code: zero points stay inside the code range; the last rounding is done in float32 on
storage-rounded scales; the clipping may start from a searched range; a cosine decay of the rate is offered.
"""

from collections.abc import Mapping
from functools import cached_property
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.func import functional_call

from omniq.quantizers.clipping import LWC, LearnedClip
from omniq.result import BlockResult, QuantizedLinear
from omniq.stages.base import BlockModule, BlockTask, PassLoader, Stage
from omniq.stages.statistics import input_importance
from omniq.stages.step import OptimizerStep


class OmniQuant(Stage):
    """Learned clipping by block-wise reconstruction.

    Args:
        epochs: passes over the samples for each block.
        batch_size: samples a step (the paper: 1).
        clipping: what is learned about the range of each group.
        clipping_lr: AdamW rate of the clipping (published code: 1e-2; the paper's text has it swapped with LET's).
        augmented_loss: add the distance to the full-precision block on the quantized stream (published for 2 bits).
        schedule: ``constant`` (published) or ``cosine``, which decays the rate to zero over the block.
        shuffle: draw a new order of samples each epoch; off as published.
    """

    def __init__(
        self,
        epochs: int = 20,
        batch_size: int = 1,
        clipping: LWC | None = None,
        clipping_lr: float = 1e-2,
        augmented_loss: bool = False,
        schedule: Literal["constant", "cosine"] = "constant",
        shuffle: bool = False,
    ) -> None:
        self.epochs, self.batch_size = epochs, batch_size
        self.clipping = clipping or LWC()
        self.clipping_lr = clipping_lr
        self.augmented_loss, self.schedule, self.shuffle = augmented_loss, schedule, shuffle

    def module(self, task: BlockTask) -> "OmniQuantModule":
        return OmniQuantModule(task, self)


class OmniQuantModule(BlockModule):
    """A block whose clipping is being learned.

    Args:
        task: the block, its streams and its grid.
        settings: of the stage.
    """

    def __init__(self, task: BlockTask, settings: OmniQuant) -> None:
        super().__init__(task)
        self.automatic_optimization = False  # so that the update can be one graph
        self.settings = settings
        importance = input_importance(task) if settings.clipping.needs_importance else {}
        weights = {name: task.linear(name).weight.detach() for name in task.family.linears}
        self.clips = nn.ModuleDict(
            {
                _key(name): settings.clipping.build(weight, task.grid, importance.get(name))
                for name, weight in weights.items()
            }
        ).to(task.device)
        self.targets = task.targets
        self.gap: Tensor | None = None  # [n]: half the mean square between the two targets of each sample
        if settings.augmented_loss:
            own = task.run(task.inputs)
            self.targets = (task.targets + own) / 2
            pairs = zip(task.targets, own, strict=True)
            self.gap = torch.stack([(a.float() - b.float()).square().mean() / 2 for a, b in pairs])

    def loader(self) -> PassLoader:
        order = self.task.seed * 10_007 + self.task.index if self.settings.shuffle else None
        return PassLoader(len(self.task.inputs), self.settings.batch_size, self.settings.epochs, order)

    def quantized_tensors(self, dtype: torch.dtype | None = None) -> dict[str, Tensor]:
        """Fake-quantized weights of the block's linears by parameter name, differentiable in what is learned."""
        weights = ((name, self.task.linear(name).weight) for name in self.task.family.linears)
        return {f"{name}.weight": self.clip(name)(weight, dtype or weight.dtype) for name, weight in weights}

    def clip(self, name: str) -> LearnedClip:
        """The clipping of one linear."""
        clip = self.clips[_key(name)]
        assert isinstance(clip, LearnedClip)
        return clip

    def forward(self, hidden: Tensor) -> Tensor:
        """The quantized block's output, ``[batch, t, h]``."""
        dtype = torch.get_autocast_dtype(hidden.device.type) if torch.is_autocast_enabled(hidden.device.type) else None
        weights = self.quantized_tensors(dtype)
        output = functional_call(self.task.block, weights, (hidden,), dict(self.task.kwargs))
        return output[0] if isinstance(output, tuple) else output

    def loss(self, inputs: Tensor, targets: Tensor) -> Tensor:
        """Mean squared error of the quantized block's output, twice it for the average of two targets."""
        error = nn.functional.mse_loss(self(inputs).float(), targets.float())
        return error if self.gap is None else 2 * error

    def training_step(self, indices: Tensor) -> None:
        inputs, _ = self.batch(indices)
        targets = self.targets[indices.to(self.targets.device)].to(inputs.device)
        loss = self.step(inputs, targets) if self.trainer.world_size == 1 else self._shared_step(inputs, targets)
        if self.gap is not None:
            loss = loss + self.gap[indices.to(self.gap.device)].mean()
        self.track("loss", loss)
        if (schedule := self.lr_schedulers()) is not None:
            schedule.step()

    @cached_property
    def step(self) -> OptimizerStep:
        """The whole update, a CUDA graph where there is a GPU."""
        scaler = getattr(self.trainer.precision_plugin, "scaler", None)
        return OptimizerStep(self.loss, self.optimizers(use_pl_optimizer=False), scaler)

    def _shared_step(self, inputs: Tensor, targets: Tensor) -> Tensor:
        """The update under several processes: Lightning averages the gradients."""
        optimizer = self.optimizers()
        optimizer.zero_grad()
        loss = self.loss(inputs, targets)
        self.manual_backward(loss)
        optimizer.step()
        return loss.detach()

    def restored(self) -> None:
        self.step.reset()

    def configure_optimizers(self) -> Any:
        rate: float | Tensor = self.settings.clipping_lr
        options: dict[str, Any] = {}
        if self.task.device.type == "cuda":  # what a CUDA graph asks for: no number of the update on the host
            rate, options = torch.tensor(rate, device=self.task.device), {"fused": True, "capturable": True}
        optimizer = torch.optim.AdamW(self.clips.parameters(), lr=rate, weight_decay=0.0, **options)
        if self.settings.schedule == "constant":
            return optimizer
        decay = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=len(self.loader()))
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": decay, "interval": "step"}}

    @torch.no_grad()
    def finish(self) -> BlockResult:
        grid = self.task.grid
        linears: Mapping[str, QuantizedLinear] = {}
        for name in self.task.family.linears:
            weight = self.task.linear(name).weight.float().to(self.device)  # Lightning may have moved us to the CPU
            scale, zero_point = self.clip(name).grid_of(weight)
            codes = grid.quantize(weight, scale, zero_point)
            linears = {**linears, name: QuantizedLinear.of(grid, codes, scale, zero_point)}
        return BlockResult(linears, self.task.plain_tensors())

    def abandon(self) -> str:
        for name in self.task.family.linears:
            self.clip(name).reset()
        return "the initial grid"


def _key(name: str) -> str:
    """Module names may not contain dots inside a ModuleDict."""
    return name.replace(".", "/")
