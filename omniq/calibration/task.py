# SPDX-License-Identifier: Apache-2.0
"""``BlockTask``: one block with its two streams, its grids, and the results of earlier stages."""

from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from omniq.blocks.activation_hooks import quantized_activations
from omniq.blocks.forward import Precision, propagate
from omniq.blocks.placement import empty_like_stream
from omniq.blocks.weights import block_tensors
from omniq.grid.affine import Grid
from omniq.grid.scheme import Activations
from omniq.models.layout import Layout
from omniq.storage.block_result import BlockResult


@dataclass
class BlockTask:
    """One block and all the information about it that a stage may use.

    Args:
        index: position of the block in the model.
        layout: the linears of the block, which of them share an input, and the equivalences between its modules.
        block: the Hugging Face block, frozen, in full precision, on the device of the run. A stage that moves scales
            between layers stores the equivalent full-precision block here, never rounded weights.
        grids: the grid of each quantized linear, by name inside the block.
        inputs: inputs of the block in the quantized model, ``[n, t, h]``.
        targets: outputs of the block in the full-precision model, ``[n, t, h]``.
        kwargs: the other arguments of the block's forward.
        seed: seed of the run; order and noise depend on (seed, index, position), never on a global generator.
        precision: enters the autocast context of the Trainer's precision plugin.
        activations: how the quantized block quantizes its activations.
        compile: compile the loss of a stage with torch.compile.
        result: the result of the previous stage; after the last stage, the result of the block.
        notes: entries for the summary of the block.
    """

    index: int
    layout: Layout
    block: nn.Module
    grids: Mapping[str, Grid]
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
        """``block/007``: the prefix of all logged values of this block."""
        return f"block/{self.index:03d}"

    @property
    def label(self) -> str:
        """``block 7``: the name of this block in messages."""
        return f"block {self.index}"

    @property
    def device(self) -> torch.device:
        """The device on which the block computes."""
        return next(self.block.parameters()).device

    @property
    def export_dtype(self) -> torch.dtype:
        """Dtype of the scales, which all grids share, and of all exported parameters that are not quantized."""
        return next(iter(self.grids.values())).scale_dtype

    def linear(self, name: str) -> nn.Linear:
        """A linear of the block by name.

        Raises:
            TypeError: the module of this name is not a Linear.
        """
        module = self.block.get_submodule(name)
        if not isinstance(module, nn.Linear):
            raise TypeError(f"{self.name}: {name} is a {type(module).__name__}, not a Linear")
        return module

    def run(self, inputs: Tensor) -> Tensor:
        """Run the block on a whole stream without gradients and return its outputs, ``[n, t, h]``."""
        outputs = empty_like_stream(inputs).copy_(inputs)
        propagate(self.block, outputs, self.kwargs, self.precision)
        return outputs

    def quantized_activations(self) -> AbstractContextManager[None]:
        """Context in which the block computes on quantized activations, as the exported model does."""
        return quantized_activations(self.block, self.layout, self.activations)

    def plain_tensors(self) -> dict[str, Tensor]:
        """Every tensor that is not the weight of a quantized linear: norms, biases, kept linears, saved buffers."""
        quantized = {f"{name}.weight" for name in self.layout.linears}
        return {name: value for name, value in block_tensors(self.block).items() if name not in quantized}
