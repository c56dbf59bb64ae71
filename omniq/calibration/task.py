# SPDX-License-Identifier: Apache-2.0
"""``BlockTask``: one block, its two streams, its grids, and what earlier stages found."""

from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from omniq.blocks.activation_hooks import quantized_activations
from omniq.blocks.forward import Precision, propagate
from omniq.blocks.placement import empty_like_stream
from omniq.grid.affine import Grid
from omniq.grid.scheme import Activations
from omniq.models.layout import Layout
from omniq.storage.block_result import BlockResult


@dataclass
class BlockTask:
    """One block and everything a stage may know of it.

    Args:
        index: position of the block in the model.
        layout: its linears, which of them share an input, and where scales may move.
        block: the Hugging Face block, frozen, in full precision, on the device of the run. A stage that moves scales
            between layers leaves the equivalent full-precision block here; it never leaves rounded weights.
        grids: the grid of each quantized linear, by name inside the block.
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
        """``block/007``: the stem of everything logged about this block."""
        return f"block/{self.index:03d}"

    @property
    def device(self) -> torch.device:
        """Where the block computes."""
        return next(self.block.parameters()).device

    @property
    def export_dtype(self) -> torch.dtype:
        """Dtype of scales, which all grids share, and of every parameter that is not quantized, as exported."""
        return next(iter(self.grids.values())).scale_dtype

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
        outputs = empty_like_stream(inputs).copy_(inputs)
        propagate(self.block, outputs, self.kwargs, self.precision)
        return outputs

    def quantized_activations(self) -> AbstractContextManager[None]:
        """While this is entered, the block computes on quantized activations, as the deployed one will."""
        return quantized_activations(self.block, self.layout, self.activations)

    def plain_tensors(self) -> dict[str, Tensor]:
        """Every parameter that is not the weight of a quantized linear, by name: norms, biases, kept linears."""
        quantized = {f"{name}.weight" for name in self.layout.linears}
        return {name: value.detach() for name, value in self.block.named_parameters() if name not in quantized}
