# SPDX-License-Identifier: Apache-2.0
"""Settings of LET in YAML: which equivalences of a block to use, their initial values, and their learning rate.

The initial values (SmoothQuant's scales, Outlier Suppression+'s shifts) are fused into the block before learning, with
the function that also fuses the result. The learned transform is therefore a further transform that starts at the
identity, and every statistic gathered in between (for a searched clipping, for instance) sees the actual weights.

A shift needs a bias in the modules that compensate for it. The exported model must be a stock model, so a linear
without a bias can get one only if the config has a switch for it (LLaMA's ``attention_bias``), and only if runtimes use
that switch, which the family declares.
"""

import functools
import logging
import warnings
from collections.abc import Collection, Sequence
from typing import TYPE_CHECKING, Any

from omniq.errors import UserError

if TYPE_CHECKING:
    from torch import nn

    from omniq.transforms.transform import Transform

log = logging.getLogger("omniq")

MEASURED_KINDS = ("norm", "value_output", "up_down")
"""Kinds whose scales follow from sizes of activations and weights, as in SmoothQuant and AWQ."""
KINDS = ("norm", "value_output", "query_key", "up_down")
"""All kinds of ``omniq.transforms.equivalences``, listed here because this module does not import torch."""


class LET:
    """Learnable equivalent transformation.

    Args:
        alpha: migration strength of the initial scales, 0 to 1 (the paper's scripts: 0.5, for some models 0.75); null
            to start scales at one.
        lr: AdamW learning rate (published code: 5e-3, for some models 1e-3; the paper's text swaps it with the rate of
            the clipping).
        shift: learn shifts where the stock module can store the resulting biases.
        equivalences: kinds of equivalences to use; by default those of the paper, which omit ``up_down``.
            ``query_key`` is learned only if queries or keys are quantized.

    Raises:
        UserError: ``alpha`` or ``lr`` is outside 0 to 1, or ``equivalences`` is empty, repeats a kind, or has an
            unknown kind.
    """

    def __init__(
        self,
        alpha: float | None = 0.5,
        lr: float = 5e-3,
        shift: bool = True,
        equivalences: Sequence[str] = ("norm", "value_output", "query_key"),
    ) -> None:
        check_alpha(alpha)
        if not 0 < lr < 1:
            raise UserError(f"transform.lr {lr} is not between 0 and 1: give a learning rate such as 5e-3")
        check_kinds(equivalences)
        self.alpha, self.lr, self.shift, self.equivalences = alpha, lr, shift, tuple(equivalences)


def check_alpha(alpha: float | None) -> None:
    """Refuse a migration strength outside 0 to 1.

    Raises:
        UserError: names the value and the range.
    """
    if alpha is not None and not 0 <= alpha <= 1:
        raise UserError(
            f"alpha {alpha} is outside 0 to 1: give 0 to keep the range of activations, up to 1 to move all of it into "
            "the weights"
        )


def check_kinds(kinds: Sequence[str], field: str = "transform.equivalences", choices: Collection[str] = KINDS) -> None:
    """Refuse an empty selection of equivalences, unknown ones and repetitions.

    Args:
        kinds: the selection.
        field: the setting that holds the selection, for the message.
        choices: the kinds that this setting accepts.

    Raises:
        UserError: names the wrong kind and the accepted kinds.
    """
    unknown = [kind for kind in kinds if kind not in choices]
    if unknown or not kinds:
        given = repr(unknown[0]) if unknown else "an empty list"
        raise UserError(f"{field}: {given} is not accepted: choose from {', '.join(choices)}")
    if twice := [kind for kind in choices if list(kinds).count(kind) > 1]:
        raise UserError(f"{field}: {twice[0]!r} is given more than once: give each kind once")


def worth_learning(kinds: Sequence[str], quantized_attention: bool) -> tuple[str, ...]:
    """The kinds that are worth learning: all but ``query_key``, which is kept only if queries or keys are quantized.

    A scale of a row also scales the grid of the row, so it changes no codes. It only changes the queries and keys that
    a quantizer sees. Without a quantizer, its gradient is rounding noise, which AdamW would follow at the full rate.
    """
    return tuple(kind for kind in kinds if quantized_attention or kind != "query_key")


@functools.cache
def warn_once(reason: str) -> None:
    """Log a warning once per process."""
    log.warning("%s", reason)


def block_transform(block: "nn.Module", family: Any, kinds: Sequence[str], shift: bool) -> "Transform":
    """The earlier form of ``omniq.calibration.fuse.block_transform``, kept for one release.

    Args:
        block: a block of a model.
        family: the ``omniq.models.family.Family`` of the model.
        kinds: the kinds of equivalences to use.
        shift: as for ``Transform``.
    """
    from omniq.transforms.transform import Transform

    moved = "omniq.transforms.let.block_transform has moved: use omniq.calibration.fuse.block_transform"
    warnings.warn(moved, DeprecationWarning, stacklevel=2)
    layout = family.layout(block, 0)
    chosen = [each for each in layout.equivalences if each.kind in kinds]
    return Transform(chosen, layout.heads, dict(block.named_parameters()), layout.can_bias, shift)
