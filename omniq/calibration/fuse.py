# SPDX-License-Identifier: Apache-2.0
"""Shared by the stages that move scales and shifts inside a block: the ranges of its inputs, and fusing.

After ``fuse`` the block computes the same function with other weights, norms and, where a shift needs them, new biases.
It is still a full-precision block, and later stages start from it.
"""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from omniq.blocks.weights import set_tensors
from omniq.calibration.input_statistics import InputRange
from omniq.calibration.observe import observe
from omniq.calibration.task import BlockTask
from omniq.models.layout import Layout
from omniq.transforms.equivalence import Equivalence
from omniq.transforms.initial import ChannelRanges
from omniq.transforms.let import warn_once
from omniq.transforms.transform import Transform


def affects_quantization(layout: Layout, equivalence: Equivalence) -> bool:
    """True if an equivalence changes a quantized tensor: the input of a quantized linear, or queries and keys."""
    return not equivalence.readers or any(name in layout.linears for name in equivalence.readers)


def block_transform(task: BlockTask, kinds: Sequence[str], shift: bool) -> Transform:
    """Build the transform of one block; warn once per process about each equivalence that cannot have a shift."""
    layout = task.layout
    chosen = [each for each in layout.equivalences if each.kind in kinds and affects_quantization(layout, each)]
    transform = Transform(chosen, layout.heads, dict(task.block.named_parameters()), layout.can_bias, shift)
    for reason in transform.unshifted.values():
        warn_once(reason)
    return transform


def input_ranges(task: BlockTask) -> ChannelRanges:
    """Measure the smallest and largest value of every input channel of the quantized linears, in one pass.

    Activations are not quantized in that pass, so that the ranges include the outliers.

    Returns:
        the ranges; linears that no token reaches have no entry.

    Raises:
        UserError: see ``Observation.results``.
    """
    seen, ranges = observe(task, [InputRange()], quantized=False), ChannelRanges()
    for group in task.layout.groups:
        if seen[group[0]].tokens:
            lo, hi = seen[group[0]].totals[0]
            ranges.lo |= dict.fromkeys(group, lo)
            ranges.hi |= dict.fromkeys(group, hi)
    return ranges


@torch.no_grad()
def fuse(block: nn.Module, transform: Transform, parameters: Mapping[str, Tensor] | nn.ParameterDict) -> None:
    """Store the transformed tensors in the block; uses the function of training, in float32, and rounds once."""
    set_tensors(block, transform.apply(dict(block.named_parameters()), parameters))
