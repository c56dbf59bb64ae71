# SPDX-License-Identifier: Apache-2.0
"""What omniq must know of a model family: where its blocks are, and which linears share an input.

Everything else is read from the model's own code, which runs untouched. A new family is one short file in
``omniq.models.families``, and one line there.
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
"""Keys of configs that give linears a bias in stock code, each with the part of a block that it governs."""


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
        equivalences: where the block allows a scale (and shift) to move without changing what it computes.
        attention: the module inside a block that calls transformers' attention interface; None if none does.
        flat: linears whose input comes without a dimension of samples, ``[tokens, i]``.
        partial_rotary: whether the code of the family heeds ``partial_rotary_factor`` of the config.
        new_biases: whether linears may get biases that the source has not, where its config has a switch for them.
        refuse: says why a variant of the family cannot be had, by its config, or returns None.
    """

    model_types: tuple[str, ...]
    blocks: str
    groups: tuple[tuple[str, ...], ...]
    equivalences: tuple[Equivalence, ...] = ()
    attention: str | None = None
    flat: tuple[str, ...] = ()
    partial_rotary: bool = False
    new_biases: bool = True
    refuse: Callable[[PretrainedConfig], str | None] = _accept

    def layout(self, block: nn.Module, index: int) -> Layout:
        """The layout of one block of a model of this family; families whose blocks differ override this.

        Args:
            block: a block of the model, possibly without weights (on the meta device).
            index: its position.
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
        """Linears without a bias to which every runtime would give one, if the config said so."""
        if not self.new_biases:
            return frozenset()
        parts = tuple(part for switch, part in BIAS_SWITCHES.items() if hasattr(config, switch))
        return frozenset(name for group in self.groups for name in group if parts and name.startswith(parts))


def config_of(block: nn.Module) -> PretrainedConfig:
    """The config that the modules of a transformers block carry."""
    modules: Iterator[Any] = block.modules()
    config: PretrainedConfig = next(module.config for module in modules if hasattr(module, "config"))
    return config
