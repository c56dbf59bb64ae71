# SPDX-License-Identifier: Apache-2.0
"""What omniq must know of a model family: where its blocks are, and which linears share an input.

Everything else is read from the model's own code, which runs untouched. A new family is one short file beside this
one, and its name in ``omniq.models.families``.
"""

from collections.abc import Callable
from dataclasses import dataclass

from transformers import PretrainedConfig


@dataclass(frozen=True)
class NormToLinears:
    """A norm whose output only these linears read: its scale can be divided there and multiplied here.

    Args:
        norm: an RMSNorm or LayerNorm with a weight.
        linears: all that read it.
    """

    norm: str
    linears: tuple[str, ...]


@dataclass(frozen=True)
class ValueToOutput:
    """Rows of the value projection against columns of the output projection (softmax rows sum to one)."""

    value: str
    output: str


@dataclass(frozen=True)
class QueryKey:
    """Rows of the query projection against rows of the key projection, within one head.

    Args:
        rotary: how rotary embedding pairs the channels of a head: ``half`` (i with i + d/2), ``interleaved``
            (2i with 2i + 1), or None where there is none. Paired channels must share one scale.
        query_norm, key_norm: norms between projection and rotary embedding, if the family has them; they take the
            scale in place of the projections' rows.
    """

    query: str
    key: str
    rotary: str | None = "half"
    query_norm: str | None = None
    key_norm: str | None = None


@dataclass(frozen=True)
class UpToDown:
    """Rows of the up projection against columns of the down projection of a gated MLP, ``down(act(gate) * up)``.

    Exact because nothing but a product lies between them. Not so where an activation does (``fc1``, ``fc2``).
    """

    up: str
    down: str


Equivalence = NormToLinears | ValueToOutput | QueryKey | UpToDown

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
        inputs: names of the quantized linears inside a block, grouped by the input tensor they share, in the order
            in which the block runs them.
        equivalences: where the block allows a scale (and shift) to move without changing what it computes.
        attention: the module inside a block that calls transformers' attention interface; None if none does.
        flat: linears whose input comes without a dimension of samples, ``[tokens, i]``.
        new_biases: whether linears may get biases that the source has not, where its config has a switch for them.
        refuse: says why a variant of the family cannot be had, by its config, or returns None.
    """

    model_types: tuple[str, ...]
    blocks: str
    inputs: tuple[tuple[str, ...], ...]
    equivalences: tuple[Equivalence, ...] = ()
    attention: str | None = None
    flat: tuple[str, ...] = ()
    new_biases: bool = True
    refuse: Callable[[PretrainedConfig], str | None] = _accept

    @property
    def linears(self) -> tuple[str, ...]:
        """Every quantized linear of a block, in order."""
        return tuple(name for group in self.inputs for name in group)
