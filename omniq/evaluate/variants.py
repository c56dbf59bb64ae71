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
    """The model to measure quantized variants on: where activations are integers, in the dtype of deployment.

    An activation near a tie that goes the other way is a perturbation like any other, and every layer behind it makes
    more of them. Two ways to compute one model, float32 and float16 for instance, have perplexities apart (SmolLM2-135M
    on 2040 tokens: 0.5 % at W8A8, 2 % at W6A6, 12 % at W4A4). So what is measured is what will run, operation by
    operation.
    """
    dtype = scheme.export_dtype
    return source.in_dtype(dtype) if scheme.activations.quantized and dtype != source.dtype else source


def full_precision_variant(index: int, block: nn.Module) -> nn.Module:
    """The block as it is."""
    return block


def rounded_variant(source: SourceModel, scheme: Scheme) -> Variant:
    """Every block rounded to nearest on the min-max grids of the scheme, its activations quantized as the scheme says.

    Where the scheme fixes the ranges of inputs, which only calibration can, each window has its own.
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
    """Every block as the run left it, its activations quantized as the scheme says."""

    def variant(index: int, block: nn.Module) -> nn.Module:
        result = read(index)
        load_quantized_weights(block, result)
        attach(block, scheme_layout(source, scheme, index), scheme.activations, result.linears)
        return block

    return variant
