# SPDX-License-Identifier: Apache-2.0
"""``Family``: the location of a model family's blocks, the linears of a block, and the inputs that they share.

omniq takes all other information from the model's own code, which runs unmodified. To add a family, add a short file to
``omniq.models.families`` and one line to its ``FAMILIES``.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from torch import nn
from transformers import PretrainedConfig

from omniq.models.layout import Layout
from omniq.transforms.equivalence import Equivalence
from omniq.transforms.heads import Heads

BIAS_SWITCHES = {"attention_bias": "self_attn.", "mlp_bias": "mlp."}
"""Keys of a config that give linears a bias in stock code, with the part of a block that each key controls."""


def _accept(config: PretrainedConfig) -> str | None:
    return None


@dataclass(frozen=True)
class Family:
    """A transformer architecture.

    Args:
        model_types: values of ``config.model_type`` in transformers.
        blocks: dotted name of the module list of blocks, such as ``model.layers``.
        groups: names of the quantized linears inside a block, grouped by the input tensor they share, in the order
            in which the block runs them.
        equivalences: changes by scales (and shifts) that leave the output of the block unchanged.
        attention: the module inside a block that calls transformers' attention interface; None if no module does.
        flat: linears whose input has no sample dimension, ``[tokens, i]``.
        partial_rotary: True if the code of the family uses ``partial_rotary_factor`` of the config.
        new_biases: True if linears may get biases that the source model lacks, where its config has a switch for them.
        returns_tuple: True if blocks return a tuple, whose first entry is the hidden states.
        batched: arguments of a block whose first dimension is a multiple of the number of samples, such as ALiBi biases
            ``[n heads, 1, t]``. They are recorded for one sample and repeated for each batch.
        refuse: returns the reason why a variant of the family is not supported, given its config; None if it is.
    """

    model_types: tuple[str, ...]
    blocks: str
    groups: tuple[tuple[str, ...], ...]
    equivalences: tuple[Equivalence, ...] = ()
    attention: str | None = None
    flat: tuple[str, ...] = ()
    partial_rotary: bool = False
    new_biases: bool = True
    returns_tuple: bool = False
    batched: tuple[str, ...] = ()
    refuse: Callable[[PretrainedConfig], str | None] = _accept

    def layout(self, block: nn.Module, index: int) -> Layout:
        """The layout of one block of a model of this family; families whose blocks differ override this method.

        Args:
            block: a block of the model, possibly without weights (on the meta device).
            index: position of the block in the model.
        """
        config = config_of(block)
        return Layout(
            model_type=config.model_type,
            groups=self.groups,
            equivalences=self.equivalences,
            attention=self.attention,
            flat=self.flat,
            heads=Heads.of(config, self.partial_rotary),
            can_bias=self._can_bias(config),
        )

    def _can_bias(self, config: PretrainedConfig) -> frozenset[str]:
        """Linears for which every runtime creates a bias if the config enables it."""
        if not self.new_biases:
            return frozenset()
        parts = tuple(part for switch, part in BIAS_SWITCHES.items() if hasattr(config, switch))
        return frozenset(name for group in self.groups for name in group if parts and name.startswith(parts))


def config_of(block: nn.Module) -> PretrainedConfig:
    """The config that the modules of a transformers block hold."""
    modules: Iterator[Any] = block.modules()
    config: PretrainedConfig = next(module.config for module in modules if hasattr(module, "config"))
    return config
