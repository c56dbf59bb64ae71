# SPDX-License-Identifier: Apache-2.0
"""What stages that move scales and shifts inside a block share: the ranges of its inputs, and fusing.

After ``fuse`` the block computes what it did, with other weights, norms and (where a shift needed them) new biases: it
stays the full-precision block that later stages start from.
"""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from omniq.blocks.weights import set_tensors
from omniq.calibration.input_statistics import InputRange
from omniq.calibration.observe import observe
from omniq.calibration.task import BlockTask
from omniq.errors import UserError
from omniq.models.layout import Layout
from omniq.transforms.equivalence import Equivalence
from omniq.transforms.initial import ChannelRanges
from omniq.transforms.let import KINDS, warn_once
from omniq.transforms.transform import Transform


def kinds_of(layout: Layout) -> list[str]:
    """The kinds of equivalences that a block has."""
    declared = {equivalence.kind for equivalence in layout.equivalences}
    return [kind for kind in KINDS if kind in declared]


def check_equivalences(layout: Layout, kinds: Sequence[str], field: str = "transform.equivalences") -> None:
    """Refuse equivalences that a block does not have.

    Args:
        field: where they were given.

    Raises:
        UserError: names the model type and the kinds that it has.
    """
    there = kinds_of(layout)
    for kind in kinds:
        if kind not in there:
            raise UserError(
                f"{field}: {layout.model_type} has no {kind!r}; "
                + (f"it has {', '.join(there)}" if there else "it has none: use a method without a transform")
            )


def concerns(layout: Layout, equivalence: Equivalence) -> bool:
    """Whether an equivalence changes what is quantized: the input of a quantized linear, or queries and keys."""
    return not equivalence.readers or any(name in layout.linears for name in equivalence.readers)


def block_transform(task: BlockTask, kinds: Sequence[str], shift: bool) -> Transform:
    """The transform of one block; warns once in a process about each equivalence that cannot have a shift."""
    layout = task.layout
    chosen = [each for each in layout.equivalences if each.kind in kinds and concerns(layout, each)]
    transform = Transform(chosen, layout.heads, dict(task.block.named_parameters()), layout.can_bias, shift)
    for reason in transform.unshifted.values():
        warn_once(reason)
    return transform


def input_ranges(task: BlockTask) -> ChannelRanges:
    """Smallest and largest value of every input channel of the quantized linears, in one pass over the stream.

    Activations are not quantized in that pass, because the ranges are those of the outliers.

    Returns:
        the ranges; without the linears that no token reaches.

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
    """Store the transformed tensors in the block: the same function as in training, float32, rounded once."""
    set_tensors(block, transform.apply(dict(block.named_parameters()), parameters))
