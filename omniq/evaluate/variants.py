# SPDX-License-Identifier: Apache-2.0
"""The variants of a model that an evaluation compares: full precision, rounded to nearest, quantized."""

from collections.abc import Callable
from typing import Any

from torch import nn

from omniq.blocks.activation_hooks import attach
from omniq.blocks.grids import scheme_grids, scheme_layout
from omniq.blocks.weights import load_quantized_weights
from omniq.evaluate.streaming import Variant
from omniq.grid.affine import rounded_to_nearest
from omniq.grid.scheme import Scheme
from omniq.models.source import SourceModel
from omniq.storage.block_result import BlockResult


def in_export_dtype(source: SourceModel, scheme: Scheme) -> SourceModel:
    """The model on which to measure quantized variants; in the export dtype if activations are quantized.

    Perplexity of a model with quantized activations depends on the compute dtype: an activation near a rounding
    boundary may round the other way, and later layers amplify the difference. Between float32 and float16, for example,
    the perplexity of SmolLM2-135M on 2040 tokens differs by 0.5 % at W8A8, 2 % at W6A6 and 12 % at W4A4. Therefore the
    measurement runs the same operations as the exported model.
    """
    dtype = scheme.export_dtype
    return source.in_dtype(dtype) if scheme.activations.quantized and dtype != source.dtype else source


def full_precision_variant(index: int, block: nn.Module) -> nn.Module:
    """Return the block unchanged."""
    return block


def rounded_variant(source: SourceModel, scheme: Scheme) -> Variant:
    """Variant whose blocks are rounded to nearest on min-max grids, with the activation quantization of the scheme.

    Fixed ranges of inputs are known only after calibration, so each window uses its own range instead.
    """

    def variant(index: int, block: nn.Module) -> nn.Module:
        grids = scheme_grids(source, scheme, index)
        for name, grid in grids.items():
            linear: Any = block.get_submodule(name)
            weight = linear.weight.detach().float()
            linear.weight.data.copy_(rounded_to_nearest(weight, grid))
        attach(block, scheme_layout(source, scheme, index), scheme.activations, None if grids else {})
        return block

    return variant


def quantized_variant(read: Callable[[int], BlockResult], source: SourceModel, scheme: Scheme) -> Variant:
    """Variant with the finished blocks of a run, with the activation quantization of the scheme."""

    def variant(index: int, block: nn.Module) -> nn.Module:
        result = read(index)
        load_quantized_weights(block, result)
        attach(block, scheme_layout(source, scheme, index), scheme.activations, result.linears)
        return block

    return variant
