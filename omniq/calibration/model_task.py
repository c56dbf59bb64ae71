# SPDX-License-Identifier: Apache-2.0
"""``ModelTask``: all finished blocks of a model, for a stage that runs once over the whole model."""

from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from omniq.blocks.forward import Precision
from omniq.blocks.placement import ActivationPlacement
from omniq.calibration.distillation import Head
from omniq.grid.scheme import Activations
from omniq.models.layout import Layout
from omniq.storage.block_result import BlockResult


@dataclass(frozen=True)
class ModelResult:
    """The changes of a stage of the whole model, without the codes that it kept.

    Args:
        changes: for each block, its relative changes by key (``omniq.calibration.tunable_block``), on the CPU.
    """

    changes: Sequence[Mapping[str, Tensor]]

    def first_unstorable(self, dtype: torch.dtype) -> str | None:
        """Return the first change that is not finite; None if all are finite."""
        for index, block in enumerate(self.changes):
            for name, value in block.items():
                if not value.to(dtype).isfinite().all():
                    return f"block {index}, {name}"
        return None

    def on_host(self) -> "ModelResult":
        """Return the result with all tensors in host memory."""
        return replace(self, changes=[{n: v.cpu() for n, v in block.items()} for block in self.changes])


@dataclass
class ModelTask:
    """All finished blocks of a model and the streams that a model stage compares.

    Args:
        block: makes the Hugging Face block of an index, frozen, in full precision, on the device of the run.
        read: reads the result of the block of an index.
        layouts: the layout of each block.
        inputs: embeddings, the inputs of block 0, ``[n, t, h]``; the last ``held_out`` samples only judge.
        targets: outputs of the last block of the full-precision model, ``[n, t, h]``.
        held_out: number of held-out samples at the end of ``inputs``.
        kwargs: for each block, the other arguments of its forward.
        head: the final norm and the output projection of the full-precision model.
        vocabulary: number of logits.
        device: device of the computation.
        export_dtype: dtype of the exported parameters.
        placement: memory for further streams.
        seed: seed of the run.
        precision: enters the autocast context of the Trainer's precision plugin.
        activations: how the quantized model quantizes its activations.
        result: the result of the stage.
        notes: entries for the summary of the run.
    """

    block: Callable[[int], nn.Module]
    read: Callable[[int], BlockResult]
    layouts: Sequence[Layout]
    inputs: Tensor
    targets: Tensor
    held_out: int
    kwargs: Sequence[Mapping[str, Any]]
    head: Head
    vocabulary: int
    device: torch.device
    export_dtype: torch.dtype
    placement: ActivationPlacement
    seed: int = 0
    precision: Precision = nullcontext
    activations: Activations = Activations()
    result: ModelResult | None = None
    notes: dict[str, Any] = field(default_factory=dict)
    index: None = None  # of a block

    @property
    def name(self) -> str:
        """``model``: the prefix of all logged values."""
        return "model"

    @property
    def label(self) -> str:
        """``model``: the name of this task in messages."""
        return "model"

    @property
    def samples(self) -> int:
        """Number of samples to learn from."""
        return len(self.inputs) - self.held_out
