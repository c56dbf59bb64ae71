# SPDX-License-Identifier: Apache-2.0
"""What a stage is: given a block, its two streams and a grid, it finds a better grid, codes or transform.

A ``Stage`` is what YAML names: a small object of settings. For every block it builds a ``BlockModule``, a
LightningModule that one ``Trainer.fit`` of one Lightning epoch drives; the passes over the data are made by the loader,
because that is the only arrangement in which a run killed twice still resumes exactly (docs/resume.md).

Shapes: ``n`` samples, ``t`` tokens of a sample, ``h`` hidden size, ``o``/``i`` output and input features, ``G`` groups.
"""

import math
import time
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import lightning as L
import torch
from torch import Tensor, nn
from typing_extensions import Self

from omniq import processes
from omniq.errors import UserError
from omniq.models.family import Family
from omniq.quantizers.grid import Grid
from omniq.quantizers.hooks import quantized_activations
from omniq.quantizers.scheme import Activations
from omniq.result import BlockResult
from omniq.streams import Precision, like, propagate, sweep, take


@dataclass
class BlockTask:
    """One block and everything a stage may know of it.

    Args:
        index: position of the block in the model.
        family: where its linears are and which share an input.
        block: the Hugging Face block, frozen, in full precision, on the device of the run. A stage that moves scales
            between layers leaves the equivalent full-precision block here; it never leaves rounded weights.
        grid: the grid asked for.
        inputs: what the quantized model feeds the block, ``[n, t, h]``.
        targets: what the full-precision model's block returns, ``[n, t, h]``.
        kwargs: the other arguments of the block's forward.
        seed: of the run; order and noise are functions of (seed, index, position), never of a global generator.
        precision: enters the autocast context of the Trainer's precision plugin.
        activations: what the quantized block does to its activations.
        compile: let torch.compile fuse the loss that a stage learns by.
        result: what the previous stage produced, and in the end what the block becomes.
        notes: entries for the block's summary.
    """

    index: int
    family: Family
    block: nn.Module
    grid: Grid
    inputs: Tensor
    targets: Tensor
    kwargs: Mapping[str, Any]
    seed: int = 0
    precision: Precision = nullcontext
    activations: Activations = Activations()
    compile: bool = False
    result: BlockResult | None = None
    notes: dict[str, Any] = field(default_factory=dict)

    @property
    def name(self) -> str:
        """``block/007``: the stem of everything logged about this block."""
        return f"block/{self.index:03d}"

    @property
    def device(self) -> torch.device:
        """Where the block computes."""
        return next(self.block.parameters()).device

    def linear(self, name: str) -> nn.Linear:
        """A linear of the block by name.

        Raises:
            TypeError: it is something else.
        """
        module = self.block.get_submodule(name)
        if not isinstance(module, nn.Linear):
            raise TypeError(f"{self.name}: {name} is a {type(module).__name__}, not a Linear")
        return module

    def run(self, inputs: Tensor) -> Tensor:
        """The block's output for a whole stream, ``[n, t, h]``, without gradients."""
        outputs = like(inputs).copy_(inputs)
        propagate(self.block, outputs, self.kwargs, self.precision)
        return outputs

    def visit(self, inputs: Tensor) -> None:
        """Run the block over a whole stream for the hooks that look on; the outputs are not kept."""
        sweep(self.block, inputs, self.kwargs, self.precision)

    def quantized_activations(self) -> AbstractContextManager[None]:
        """While this is entered, the block computes on quantized activations, as the deployed one will."""
        return quantized_activations(self.block, self.family, self.activations)

    def plain_tensors(self) -> dict[str, Tensor]:
        """Every parameter that is not the weight of a quantized linear, by name: norms and biases."""
        quantized = {f"{name}.weight" for name in self.family.linears}
        return {name: value.detach() for name, value in self.block.named_parameters() if name not in quantized}


class PassLoader:
    """A sized, stateful loader: several passes over the samples as one sequence of batches.

    Yields int64 sample indices, ``[batch]``. Lightning saves and restores its position. The order of a pass is a
    permutation drawn from (seed, pass), or the natural one.

    Args:
        samples: number of samples; a last, smaller batch is kept.
        batch_size: samples a step.
        passes: passes over the samples.
        seed: of the permutation; None for the natural order (the paper's).
    """

    def __init__(self, samples: int, batch_size: int = 1, passes: int = 1, seed: int | None = None) -> None:
        self.samples, self.batch_size, self.passes, self.seed = samples, batch_size, passes, seed
        self.position = 0

    @property
    def steps_per_pass(self) -> int:
        """Batches of one pass."""
        return -(-self.samples // self.batch_size)

    def __len__(self) -> int:
        return self.passes * self.steps_per_pass

    def __iter__(self) -> Iterator[Tensor]:
        while self.position < len(self):
            turn, step = divmod(self.position, self.steps_per_pass)
            # NOTE: advance before the yield; code after the last yield of a sized loader never runs.
            self.position += 1
            yield self._order(turn)[step * self.batch_size : (step + 1) * self.batch_size]

    def _order(self, turn: int) -> Tensor:
        if self.seed is None:
            return torch.arange(self.samples)
        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + turn)
        return torch.randperm(self.samples, generator=generator)

    def pass_of(self, step: int) -> int:
        """Number of the pass, from 0, that step number ``step`` (from 1) belongs to."""
        return (step - 1) // self.steps_per_pass

    def ends_pass(self, step: int) -> bool:
        """Whether step number ``step`` (from 1) is the last of its pass: a moment to save."""
        return step % self.steps_per_pass == 0

    def state_dict(self) -> dict[str, int]:
        return {"position": self.position}

    def load_state_dict(self, state: Mapping[str, int]) -> None:
        self.position = state["position"]


class BlockModule(L.LightningModule):
    """One block in the hands of one stage.

    The block itself is kept out of the module tree: it is frozen, already on its device, and not part of a checkpoint.
    What remains in ``state_dict()`` is what the stage learns.
    """

    save_interval = 0.0

    def __init__(self, task: BlockTask) -> None:
        super().__init__()
        self._outside = (task,)
        self.tracked: list[tuple[str, Tensor]] = []
        self._paused, self._paused_at = (0, False), -math.inf

    @property
    def task(self) -> BlockTask:
        """The block, its streams and its grid."""
        return self._outside[0]

    def batch(self, indices: Tensor) -> tuple[Tensor, Tensor]:
        """Inputs and targets of these samples on the block's device, each ``[batch, t, h]``."""
        task = self.task
        return take(task.inputs, indices, task.device), take(task.targets, indices, task.device)

    def cpu(self) -> Self:
        """Stays: Lightning would take what was learned to the host when the fit ends, and ``finish`` wants it here."""
        return self

    def transfer_batch_to_device(self, batch: Any, device: torch.device, dataloader_idx: int) -> Any:
        """Indices go to where the streams are: a GPU would have to be asked for them again if those are on the host."""
        return super().transfer_batch_to_device(batch, self.task.inputs.device, dataloader_idx)

    def pauses_after(self, step: int) -> bool:
        """Whether losses are read and the fit is saved after this step (from 1): where a pass ends.

        Stages whose passes last milliseconds wait ``save_interval`` seconds in between; what is saved when changes
        nothing about the result.
        """
        if self._paused[0] != step:
            now = time.monotonic()
            waited = processes.count() > 1 or now - self._paused_at >= self.save_interval  # processes must agree
            self._paused = (step, waited and self.batches.ends_pass(step))
            self._paused_at = now if self._paused[1] else self._paused_at
        return self._paused[1]

    def track(self, name: str, value: Tensor) -> None:
        """Record a scalar of this step, such as ``loss``; it stays on the device until the pass ends."""
        self.tracked.append((name, value.detach()))

    @cached_property
    def batches(self) -> PassLoader:
        """The one loader of this fit."""
        return self.loader()

    @abstractmethod
    def loader(self) -> PassLoader:
        """A new loader over the batches of the whole stage, in order."""

    @abstractmethod
    def finish(self) -> BlockResult:
        """Round for the last time, in float32 on storage-rounded scales; leave ``task.block`` in full precision."""

    def restored(self) -> None:
        """Called after a guard has put an earlier state back: forget whatever was derived from the other one."""

    def abandon(self) -> str:
        """Give up learning, after repeated non-finite losses or such an end: go back to where the stage began.

        Returns:
            one line for the summary that says what the block falls back to.

        Raises:
            UserError: there is nothing to go back to.
        """
        stage = type(self).__name__.removesuffix("Module")
        raise UserError(
            f"block {self.task.index}: {stage} met values that are not finite, and has no start to return to: "
            "give another trainer.precision, or bfloat16 or float32 as scheme.dtype"
        )


class Stage(ABC):
    """Settings of a method, named in YAML by ``class_path``; one module is built of them for each block."""

    @property
    def sparse(self) -> bool:
        """Whether results have outliers, or scales that are codes, beside the codes: not every format can hold them."""
        return False

    @property
    def refines(self) -> bool:
        """Whether it builds on the codes or the grid of the stage before it, instead of starting from the weights."""
        return False

    @property
    def chooses_codes(self) -> bool:
        """Whether its codes are more than the nearest on its grid: a stage that keeps the grid alone loses them."""
        return False

    @property
    def tunes_norms(self) -> bool:
        """Whether its codes go with norms that its result holds and the block does not."""
        return False

    @property
    def moves(self) -> bool:
        """Whether it leaves a transformed block, from whose weights a later stage may start."""
        return False

    @abstractmethod
    def module(self, task: BlockTask) -> BlockModule:
        """The LightningModule that works on this block."""

    def check_family(self, family: Family) -> None:  # noqa: B027 (most stages accept any family)
        """Refuse a family that lacks what this stage needs.

        Raises:
            UserError: names the family and what it has.
        """

    def check(self, before: Sequence["Stage"]) -> None:  # noqa: B027 (most stages accept any place)
        """Refuse a place in the list of stages where this one cannot work.

        Args:
            before: the stages that run earlier on the same block.

        Raises:
            UserError: names both stages and the order that works.
        """
