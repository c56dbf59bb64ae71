# SPDX-License-Identifier: Apache-2.0
"""The layout of one block: its quantized linears, the inputs they share, and its equivalences.

A layout belongs to one block of one model. Blocks of the same model may differ (dense layers before experts, layers
with other attention), and a run may leave linears of some blocks in floating point. Stages, hooks, exports and
evaluations use only the layout, never the family.
"""

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field, replace

from omniq.transforms.equivalence import Equivalence
from omniq.transforms.heads import Heads


@dataclass(frozen=True)
class Layout:
    """The structure of one block, as omniq quantizes it.

    Args:
        model_type: type of the model, for messages.
        groups: names of the quantized linears inside the block, grouped by the input tensor they share, in the order
            in which the block runs them.
        heads: the attention heads of the block.
        equivalences: changes by scales (and shifts) that leave the output of the block unchanged.
        attention: the module inside the block that calls transformers' attention interface; None if no module does.
        flat: quantized linears whose input has no sample dimension, ``[tokens, i]``, but holds the tokens of all
            samples in order.
        can_bias: linears without a bias that may get one, because the config of the model has a switch for it.
        kept: linears that stay in floating point, with the reason for each.
        rejected: equivalences that were proposed for an undeclared family and change the output of the block, with
            the measured error of each (``omniq.models.verify_equivalences``).
    """

    model_type: str
    groups: tuple[tuple[str, ...], ...]
    heads: Heads
    equivalences: tuple[Equivalence, ...] = ()
    attention: str | None = None
    flat: tuple[str, ...] = ()
    can_bias: frozenset[str] = frozenset()
    kept: Mapping[str, str] = field(default_factory=dict)
    rejected: Mapping[str, float] = field(default_factory=dict)

    @property
    def linears(self) -> tuple[str, ...]:
        """Every quantized linear of the block, in the order in which the block runs them."""
        return tuple(name for group in self.groups for name in group)

    def keep(self, names: Collection[str], reason: str) -> "Layout":
        """Return the layout with these linears left in floating point, too."""
        groups = (tuple(name for name in group if name not in names) for group in self.groups)
        kept = {name: reason for name in self.linears if name in names}
        flat = tuple(name for name in self.flat if name not in names)
        return replace(self, groups=tuple(group for group in groups if group), flat=flat, kept={**self.kept, **kept})
