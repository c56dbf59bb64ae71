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

import torch
from torch import Tensor
from torch.func import functional_call

from omniq.blocks.placement import gather_samples
from omniq.calibration.gradient_module import GradientModule
from omniq.calibration.loader import PassLoader
from omniq.calibration.module import BlockModule
from omniq.calibration.settings import Reconstruction
from omniq.calibration.task import BlockTask
from omniq.calibration.token_weights import weighted_error
from omniq.models.experts import LinearExperts
from omniq.storage.block_result import BlockResult


class ReconstructionModule(GradientModule[BlockTask], BlockModule):
    """Learns the quantization of one block.

    Args:
        task: the block, its streams and its grids.
        settings: the settings of the stage.
    """

    def __init__(self, task: BlockTask, settings: Reconstruction) -> None:
        super().__init__(task, settings.schedule)
        self.settings = settings
        self.targets = task.targets
        self.gap: Tensor | None = None  # [n]: half the weighted mean square between the two targets of each sample

    @abstractmethod
    def quantized_tensors(self, dtype: torch.dtype | None = None) -> dict[str, Tensor]:
        """Tensors of the block by name, with fake-quantized weights; differentiable in the learned parameters.

        Args:
            dtype: dtype of the fake-quantized weights, so that autocast does not convert them.
        """

    @property
    def capturable(self) -> bool:
        return not any(isinstance(module, LinearExperts) for module in self.task.block.modules())

    @abstractmethod
    def finish(self) -> BlockResult:
        """Return the final codes and tensors of the block."""

    @property
    def compiles(self) -> bool:
        return self.task.compile

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
        loss = self.update(inputs, targets)
        if self.gap is not None:
            loss = loss + self.gap[indices.to(self.gap.device)].mean()
        self.track("loss", loss)


def module_key(name: str) -> str:
    """Key of a linear in a ModuleDict or ParameterDict, which allow no dots."""
    return name.replace(".", "/")
