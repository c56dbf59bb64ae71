# SPDX-License-Identifier: Apache-2.0
"""OmniQuant (arXiv 2308.13137): learn clipping and transform of a block against the block's own output.

For a block ``F`` with weights ``W`` and inputs ``X`` (the quantized stream), equation 1 of the paper:

    minimise over clipping and transform   || F(W, X_fp) - F(Q(T(W); clipping), X) ||^2        (mean over all elements)

``T`` moves scales and shifts between norms, activations and weights (LET, section 3.3) and changes nothing that ``F``
computes in full precision. Where the scheme has activation bits, the quantized block computes on quantized inputs,
queries, keys and values, in training as when deployed. After the last step ``T`` is fused into the block.

The block is the untouched Hugging Face module: its weights are replaced for the length of one call by fake-quantized
ones (``torch.func.functional_call``). One AdamW step for each batch; the paper's scripts use batches of one sample,
20 epochs (40 at 2 bits), rate 1e-2, no weight decay, constant rate, natural order.

The augmented loss adds ``|| F(W, X) - F(Q(W), X) ||^2``. With ``a`` and ``b`` the two targets,
``|a - y|^2 + |b - y|^2 = 2 |(a + b)/2 - y|^2 + |a - b|^2 / 2``, so omniq averages them once and trains on one target;
the constant is added so that the loss reads as the two-term one.

Deviations from the published code: zero points stay inside the code range; the last rounding is done in float32 on
storage-rounded scales; the clipping may start from a searched range; a cosine decay of the rate is offered; the
transform is exact (``omniq.transforms.equivalence``), learned as ``exp(theta)`` and with shifts for every family.
"""

from collections.abc import Sequence
from functools import cached_property
from typing import Any, Literal

import torch
from lightning.pytorch.core.optimizer import LightningOptimizer
from torch import Tensor, nn
from torch.func import functional_call
from torch.optim.lr_scheduler import LRScheduler

from omniq.errors import UserError
from omniq.models.family import Family
from omniq.quantizers.clipping import LWC, Clipping, ClippingMethod, LearnableClip
from omniq.result import BlockResult, QuantizedLinear
from omniq.stages.base import BlockModule, BlockTask, PassLoader, Stage
from omniq.stages.statistics import importance_for
from omniq.stages.step import OptimizerStep
from omniq.stages.transform import fuse, input_ranges, moved_tensors
from omniq.streams import take
from omniq.transforms.equivalence import Transform
from omniq.transforms.initial import initial_values
from omniq.transforms.let import LET, block_transform, check_equivalences


class OmniQuant(Stage):
    """Learned clipping and transform by block-wise reconstruction.

    Args:
        epochs: passes over the samples for each block.
        batch_size: samples a step (the paper: 1); of several processes, of each.
        clipping: what is learned about the range of each group: LWC, PACT or LSQ, or a fixed MinMax or Searched.
        clipping_lr: AdamW rate of the clipping (published code: 1e-2; the paper's text has it swapped with LET's).
        transform: scales and shifts that are learned with it; none if not given (published for weight-only LLaMA).
        augmented_loss: add the distance to the full-precision block on the quantized stream (published for 2 bits).
        schedule: ``constant`` (published) or ``cosine``, which decays the rate to zero over the block.
        shuffle: draw a new order of samples each epoch; off as published.
    """

    def __init__(
        self,
        epochs: int = 20,
        batch_size: int = 1,
        clipping: LWC | ClippingMethod | None = None,
        clipping_lr: float = 1e-2,
        transform: LET | None = None,
        augmented_loss: bool = False,
        schedule: Literal["constant", "cosine"] = "constant",
        shuffle: bool = False,
    ) -> None:
        self.epochs, self.batch_size = epochs, batch_size
        self.clipping = clipping or LWC()
        self.clipping_lr, self.transform = clipping_lr, transform
        self.augmented_loss, self.schedule, self.shuffle = augmented_loss, schedule, shuffle

    def check(self, before: Sequence[Stage]) -> None:
        for name, value in (("epochs", self.epochs), ("batch_size", self.batch_size)):
            if value < 1:
                raise UserError(f"stages: OmniQuant.{name} {value} is too small: give 1 or more")
        if not 0 < self.clipping_lr < 1:
            raise UserError(f"stages: OmniQuant.clipping_lr {self.clipping_lr} is no usable rate: the paper's is 0.01")
        if isinstance(self.clipping, Clipping) and self.transform is None:
            raise UserError(
                f"stages: OmniQuant has nothing to learn with clipping {type(self.clipping).__name__}: give it one "
                "that learns, such as LWC, or a transform"
            )

    def module(self, task: BlockTask) -> "OmniQuantModule":
        return OmniQuantModule(task, self)

    def check_family(self, family: Family) -> None:
        if self.transform is not None:
            check_equivalences(family, self.transform.equivalences)


class OmniQuantModule(BlockModule):
    """A block whose clipping and transform are being learned.

    Args:
        task: the block, its streams and its grid.
        settings: of the stage.
    """

    def __init__(self, task: BlockTask, settings: OmniQuant) -> None:
        super().__init__(task)
        self.automatic_optimization = False  # so that the update can be one graph
        self.settings = settings
        self.transform, self.moves = self._start_transform()
        importance = importance_for(settings.clipping, task)
        weights = {name: task.linear(name).weight.detach() for name in task.family.linears}
        self.clips = nn.ModuleDict(
            {
                _key(name): settings.clipping.build(weight, task.grid, importance.get(name))
                for name, weight in weights.items()
            }
        )
        self.to(task.device)
        self.targets = task.targets
        self.gap: Tensor | None = None  # [n]: half the mean square between the two targets of each sample
        if settings.augmented_loss:
            own = task.run(task.inputs)
            pairs = zip(task.targets, own, strict=True)
            self.gap = torch.stack([(a.float() - b.float()).square().mean() / 2 for a, b in pairs])
            self.targets = own.add_(task.targets).div_(2)  # in place: a stream may be all that memory holds

    def loader(self) -> PassLoader:
        order = self.task.seed * 10_007 + self.task.index if self.settings.shuffle else None
        return PassLoader(len(self.task.inputs), self.settings.batch_size, self.settings.epochs, order)

    def _start_transform(self) -> tuple[Transform | None, nn.ParameterDict | None]:
        """Fuse the initial values into the block; what is learned from there starts at the identity."""
        task, let = self.task, self.settings.transform
        if let is None:
            return None, None
        transform = block_transform(task.block, task.family, let.equivalences, let.shift)
        values = initial_values(transform, dict(task.block.named_parameters()), input_ranges(task), let.alpha)
        fuse(task.block, transform, transform.parameters(values).to(task.device))
        return transform, transform.parameters()

    def tensors(self) -> dict[str, Tensor]:
        """Full-precision tensors of the block as the transform makes them, differentiable in it."""
        if self.transform is None or self.moves is None:
            return {f"{name}.weight": self.task.linear(name).weight for name in self.task.family.linears}
        return moved_tensors(self.task.block, self.transform, self.moves)

    def quantized_tensors(self, dtype: torch.dtype | None = None) -> dict[str, Tensor]:
        """The block's tensors by name, weights of linears fake-quantized; differentiable in what is learned.

        Without a transform there are only those weights.
        """
        tensors = self.tensors()
        for name in self.task.family.linears:
            out = dtype or self.task.linear(name).weight.dtype
            moving = self.transform is not None
            tensors[f"{name}.weight"] = self.clip(name)(tensors[f"{name}.weight"], out, moving)
        return tensors

    def clip(self, name: str) -> LearnableClip:
        """The clipping of one linear."""
        clip = self.clips[_key(name)]
        assert isinstance(clip, LearnableClip)
        return clip

    def forward(self, hidden: Tensor) -> Tensor:
        """The quantized block's output, ``[batch, t, h]``."""
        dtype = torch.get_autocast_dtype(hidden.device.type) if torch.is_autocast_enabled(hidden.device.type) else None
        weights = self.quantized_tensors(dtype)
        with self.task.quantized_activations():
            output = functional_call(self.task.block, weights, (hidden,), dict(self.task.kwargs))
        return output[0] if isinstance(output, tuple) else output

    def loss(self, inputs: Tensor, targets: Tensor) -> Tensor:
        """Mean squared error of the quantized block's output, twice it for the average of two targets."""
        error = nn.functional.mse_loss(self(inputs).float(), targets.float())
        return error if self.gap is None else 2 * error

    def training_step(self, indices: Tensor) -> None:
        inputs, targets = (take(stream, indices, self.task.device) for stream in (self.task.inputs, self.targets))
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
        return OptimizerStep(self.loss, self.trainer.optimizers[0], scaler)

    def _shared_step(self, inputs: Tensor, targets: Tensor) -> Tensor:
        """The update under several processes: Lightning averages the gradients."""
        optimizer = self.optimizers()
        assert isinstance(optimizer, LightningOptimizer)
        optimizer.zero_grad()
        loss = self.loss(inputs, targets)
        self.manual_backward(loss)
        optimizer.step()
        return loss.detach()

    def restored(self) -> None:
        self.step.reset()

    def configure_optimizers(self) -> Any:
        groups = self._learned()
        options: dict[str, Any] = {}
        if self.task.device.type == "cuda":  # what a CUDA graph asks for: no number of the update on the host
            options = {"fused": True, "capturable": True}
            groups = [{**group, "lr": torch.tensor(group["lr"], device=self.task.device)} for group in groups]
        optimizer = torch.optim.AdamW(groups, weight_decay=0.0, **options)
        if self.settings.schedule == "constant":
            return optimizer
        decay = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=len(self.loader()))
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": decay, "interval": "step"}}

    def _learned(self) -> list[dict[str, Any]]:
        """Parameter groups of what is learned, each with its rate."""
        clips = [each for each in self.clips.parameters() if each.requires_grad]
        groups: list[dict[str, Any]] = [{"params": clips, "lr": self.settings.clipping_lr}] if clips else []
        if self.settings.transform is not None and self.moves is not None:
            groups.append({"params": list(self.moves.parameters()), "lr": self.settings.transform.lr})
        return groups

    @torch.no_grad()
    def finish(self) -> BlockResult:
        task, grid = self.task, self.task.grid
        self.to(task.device)  # Lightning may have moved us to the CPU
        tensors = self.tensors()
        linears: dict[str, QuantizedLinear] = {}
        for name in task.family.linears:
            weight = tensors[f"{name}.weight"].float()
            scale, zero_point = self.clip(name).grid_of(weight)
            linears[name] = QuantizedLinear.of(grid, grid.quantize(weight, scale, zero_point), scale, zero_point)
        if self.transform is None or self.moves is None:
            return BlockResult(linears, task.plain_tensors())
        plain = {name: tensors[name].to(grid.scale_dtype) for name in task.plain_tensors()}  # as stored
        fuse(task.block, self.transform, self.moves)
        return BlockResult(linears, plain)

    @torch.no_grad()
    def abandon(self) -> str:
        for name in self.task.family.linears:
            self.clip(name).reset()
        for value in self.moves.parameters() if self.moves is not None else ():
            value.zero_()
        return "the initial grid" if self.moves is None else "the initial grid and transform"


def _key(name: str) -> str:
    """Module names may not contain dots inside a ModuleDict."""
    return name.replace(".", "/")
