# SPDX-License-Identifier: Apache-2.0
"""The LightningModule of ``omniq.stages.EndToEnd``.

Relative changes of all blocks are a few flat parameters, one for each kind (scales, vectors, codes), so that Adam is
one operation and the best state one copy.

Shapes: ``n`` samples, ``t`` tokens of a sample, ``h`` hidden size.
"""

from collections.abc import Mapping
from functools import cached_property
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from omniq.blocks.placement import gather_samples
from omniq.calibration.gradient_module import GradientModule
from omniq.calibration.loader import PassLoader
from omniq.calibration.model_task import ModelResult, ModelTask
from omniq.calibration.tunable_block import change_shapes, unflatten
from omniq.calibration.tunable_model import ResidentModel, StreamedModel, is_streamed
from omniq.distributed import collectives
from omniq.models.propose import expert_of

if TYPE_CHECKING:
    from omniq.stages.end_to_end import EndToEnd


class EndToEndModule(GradientModule[ModelTask]):
    """Learns relative changes of all blocks.

    Args:
        task: the finished blocks and the streams.
        settings: the settings of the stage.
    """

    initial_kl: Tensor
    best_kl: Tensor
    waited: Tensor

    def __init__(self, task: ModelTask, settings: "EndToEnd") -> None:
        super().__init__(task, "cosine")
        self.settings = settings
        self.shapes: dict[str, dict[str, tuple[int, ...]]] = {"scales": {}, "vectors": {}, "codes": {}}
        codes = 0
        for index in range(len(task.layouts)):
            result = task.read(index)
            codes += sum(linear.codes.numel() for linear in result.linears.values())
            for key, shape in change_shapes(result, settings.codes).items():
                self.shapes[_kind(key)][f"{index}/{key}"] = shape
        self.shapes = {kind: shapes for kind, shapes in self.shapes.items() if shapes}
        for kind, shapes in self.shapes.items():
            size = sum(torch.Size(shape).numel() for shape in shapes.values())
            self.register_parameter(kind, nn.Parameter(torch.zeros(size)))
            self.register_buffer(f"best_{kind}", torch.zeros(size))
        for name in ("initial_kl", "best_kl"):  # of the held-out samples
            self.register_buffer(name, torch.tensor(float("inf"), dtype=torch.float64))
        self.register_buffer("waited", torch.tensor(0))
        self.to(task.device)
        self.streamed = is_streamed(task, codes, settings.batch_size, settings.memory)

    @cached_property
    def model(self) -> "ResidentModel | StreamedModel":
        """The quantized model; built at the first step, so that a fit that has ended does not build it."""
        kind = StreamedModel if self.streamed else ResidentModel
        return kind(self.task, self.settings.codes)

    def loader(self) -> PassLoader:
        settings = self.settings
        if self.streamed:  # the last pass only judges
            return PassLoader(1, 1, settings.epochs + 1)
        return PassLoader(self.task.samples, settings.batch_size, settings.epochs, self.task.seed * 10_007)

    def changes(self) -> list[dict[str, Tensor]]:
        """Relative changes of every block by key; views that are differentiable in the parameters."""
        return self._by_block({kind: self.get_parameter(kind) for kind in self.shapes})

    def _by_block(self, flat: Mapping[str, Tensor]) -> list[dict[str, Tensor]]:
        blocks: list[dict[str, Tensor]] = [{} for _ in self.task.layouts]
        for kind, values in flat.items():
            for name, value in unflatten(values, self.shapes[kind]).items():
                index, _, key = name.partition("/")
                blocks[int(index)][key] = value
        return blocks

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        checkpoint["streamed"] = self.streamed

    def can_resume(self, checkpoint: Mapping[str, Any]) -> bool:
        """True if the fit was saved in the same mode. With ``memory: auto``, the free memory may select another."""
        return bool(checkpoint["streamed"] == self.streamed)

    def on_train_start(self) -> None:
        super().on_train_start()
        self._judge_start()

    def _judge_start(self) -> None:
        if isinstance(self.model, ResidentModel) and not self.best_kl.isfinite():
            self._judge(self.model.held_out(self.changes()))

    @property
    def capturable(self) -> bool:
        return not any(expert_of(name) for layout in self.task.layouts for name in layout.linears)

    def loss(self, inputs: Tensor, targets: Tensor) -> Tensor:
        assert isinstance(self.model, ResidentModel)
        return self.model.loss(inputs, targets, self.changes())

    def training_step(self, indices: Tensor, batch_idx: int) -> None:
        if isinstance(self.model, StreamedModel):
            self._full_batch_step(self.model, last=batch_idx + 1 == len(self.batches))
            return
        task = self.task
        batch = (gather_samples(stream, indices, task.device) for stream in (task.inputs, task.targets))
        self.track("loss", self.update(*batch))
        if self.batches.ends_pass(batch_idx + 1):
            self._judge(self.model.held_out(self.changes()))

    def _full_batch_step(self, model: StreamedModel, last: bool) -> None:
        """Judge the present state and, except in the last pass, make one step on all samples of all processes."""
        optimizer: Any = self.trainer.optimizers[0]
        optimizer.zero_grad()
        loss, held_out = model.gradients(self.changes())
        self._judge(held_out)
        if last:
            return
        for parameter in self.parameters():
            if parameter.grad is not None:
                collectives.all_reduce_sum(parameter.grad).div_(collectives.world_size())
        optimizer.step()
        self.track("loss", loss)
        self.advance_schedule()

    @torch.no_grad()
    def _judge(self, held_out: Tensor) -> None:
        """Keep the present state if its held-out KL is the least so far; stop after too many passes without a gain."""
        self.track("held_out_kl", held_out)
        if not held_out.isfinite():  # the guard restores an earlier state
            return
        if not self.initial_kl.isfinite():
            self.initial_kl.copy_(held_out)
        better = bool(held_out < self.best_kl)
        if better:
            self.best_kl.copy_(held_out)
            for kind in self.shapes:
                self.get_buffer(f"best_{kind}").copy_(self.get_parameter(kind))
        self.waited.fill_(0 if better else int(self.waited) + 1)
        if int(self.waited) >= self.settings.patience:
            self.trainer.should_stop = True

    @property
    def steps(self) -> int:
        return len(self.loader()) - self.streamed

    def parameter_groups(self) -> list[dict[str, Any]]:
        settings = self.settings
        rates = {"scales": settings.lr, "vectors": settings.vectors_lr, "codes": settings.codes_lr}
        return [{"params": [self.get_parameter(kind)], "lr": rates[kind]} for kind in self.shapes]

    @torch.no_grad()
    def restored(self) -> None:
        super().restored()
        if self.streamed:  # the loss of a full-batch step is that of the state before: the saved state was not judged
            for kind in self.shapes:
                self.get_parameter(kind).copy_(self.get_buffer(f"best_{kind}"))
            self.waited.sub_(1)  # the next pass judges this state again
        self._judge_start()  # the guard saved the first state before it was judged

    def on_train_end(self) -> None:
        super().on_train_end()
        self.__dict__.pop("model", None)

    @torch.no_grad()
    def finish(self) -> ModelResult:
        judged = {"held_out_kl.before": self.initial_kl, "held_out_kl": self.best_kl}
        self.task.notes |= {name: float(value) for name, value in judged.items() if value.isfinite()}
        flat = {kind: self.get_buffer(f"best_{kind}").cpu() for kind in self.shapes}
        return ModelResult(self._by_block(flat))

    @torch.no_grad()
    def abandon(self) -> str:
        for kind in self.shapes:
            self.get_parameter(kind).zero_()
            self.get_buffer(f"best_{kind}").zero_()
        self.best_kl.copy_(self.initial_kl)
        return "the model as its blocks were calibrated"


def _kind(key: str) -> str:
    return {"scale": "scales", "codes": "codes"}.get(key.partition(":")[2], "vectors")
