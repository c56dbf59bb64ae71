# SPDX-License-Identifier: Apache-2.0
"""The logits that an export should give: the stock model with the dequantized weights of its files, in float32.

The model runs block by block, and needs neither the run nor the source model.

Shapes: ``t`` tokens, ``v`` vocabulary.
"""

from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from omniq.blocks.activation_hooks import attach
from omniq.blocks.grids import scheme_layout
from omniq.evaluate.streaming import stream_logits
from omniq.export.containers.container import Reader
from omniq.export.verify.blockwise import Parts
from omniq.grid.scheme import Scheme
from omniq.models.meta import meta_model
from omniq.models.source import SourceModel


def reference_logits(reader: Reader, scheme: Scheme, tokens: Tensor, folder: Path) -> Tensor:
    """Logits ``[t, v]`` of an export, computed by omniq.

    Args:
        reader: the opened export.
        scheme: the quantization of activations.
        tokens: int64 ``[t]``.
        folder: the export, to name in messages.
    """

    def part(name: str) -> Tensor:
        linear = name.removesuffix(".weight")
        return reader.read(linear).dequantize() if linear in reader.linears else reader[name].float()

    def quantized(index: int, block: nn.Module) -> nn.Module:
        layout, prefix = scheme_layout(source, scheme, index), source.block_name(index)
        linears = {name: reader.read(f"{prefix}.{name}") for name in layout.linears if scheme.activations.static}
        attach(block, layout, scheme.activations, linears)
        return block

    stock = meta_model(reader.model.config, torch.float32, "eager")  # the only attention that all models have
    source = SourceModel.of(stock, Parts(reader.model, torch.float32, part), folder)
    return next(logits for _, logits, _ in stream_logits(source, tokens[None], {"export": quantized}))[0]


@dataclass(frozen=True)
class Distance:
    """How far the next-token distributions of a runtime are from those of omniq.

    Args:
        largest: largest difference of a logit, after the logits of each position are normalized to log-probabilities.
        divergence: mean over the positions of ``KL(omniq || runtime)``, in nats.
    """

    largest: float
    divergence: float

    @classmethod
    def of(cls, found: Tensor, expected: Tensor) -> "Distance":
        """Compare logits or log-probabilities ``[t, v]``; the runtime may have more columns, for padding."""
        ours = expected.double().log_softmax(-1)
        theirs = found[:, : ours.shape[1]].double().log_softmax(-1)
        divergence = (ours.exp() * (ours - theirs)).sum(-1).mean()
        return cls(float((ours - theirs).abs().max()), float(divergence))
