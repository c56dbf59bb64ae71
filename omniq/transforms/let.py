# SPDX-License-Identifier: Apache-2.0
"""LET in YAML: which equivalences of a block are used, where they start, and how fast they are learned.

The start (SmoothQuant's scales, Outlier Suppression+'s shifts) is fused into the block before anything is learned, with
the same function that fuses the end. What is learned is then a further transform that begins at the identity, and every
statistic taken in between (a searched clipping, for instance) sees the weights as they are.

A shift needs a bias at its far end. Linears of the stock module that have none can get one only if the config has a
switch for it (LLaMA's ``attention_bias``), since the exported model must be a stock model, and only if runtimes heed
that switch, which a family knows.
"""

import functools
import logging
from collections.abc import Collection, Sequence

from omniq.errors import UserError
from omniq.transforms.equivalences import EQUIVALENCES
from omniq.transforms.initial import check_alpha

log = logging.getLogger("omniq")

KINDS = tuple(each.kind for each in EQUIVALENCES)
MEASURED_KINDS = tuple(each.kind for each in EQUIVALENCES if each.measured)
"""Kinds whose scales follow from sizes of activations and weights."""


class LET:
    """Learnable equivalent transformation.

    Args:
        alpha: migration strength of the initial scales, 0 to 1 (the paper's scripts: 0.5, for some models 0.75);
            null starts at one.
        lr: AdamW rate (published code: 5e-3, for some models 1e-3; the paper's text has it swapped with clipping's).
        shift: learn shifts where the stock module can store the biases they make.
        equivalences: those to use; the paper's by default, which leave out ``up_down``. ``query_key`` is learned only
            where queries or keys are quantized.

    Raises:
        UserError: alpha outside 0..1, a rate outside 0..1, no equivalence, an unknown one or one given twice.
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
            raise UserError(f"transform.lr {lr} is no usable rate: give one such as 5e-3")
        check_kinds(equivalences)
        self.alpha, self.lr, self.shift, self.equivalences = alpha, lr, shift, tuple(equivalences)


def check_kinds(kinds: Sequence[str], field: str = "transform.equivalences", choices: Collection[str] = KINDS) -> None:
    """Refuse an empty selection of equivalences, unknown ones and repetitions.

    Args:
        field: where they were given.
        choices: those that are of use there.

    Raises:
        UserError: names it and what there is.
    """
    unknown = [kind for kind in kinds if kind not in choices]
    if unknown or not kinds:
        given = repr(unknown[0]) if unknown else "an empty list"
        raise UserError(f"{field}: {given} is not usable, choose from {', '.join(choices)}")
    if twice := [kind for kind in choices if list(kinds).count(kind) > 1]:
        raise UserError(f"{field}: {twice[0]!r} is there more than once: give each once")


def worth_learning(kinds: Sequence[str], quantized_attention: bool) -> tuple[str, ...]:
    """These kinds, but ``query_key`` only where queries or keys are quantized.

    A scale of rows takes their grids with it: all that it changes is what queries and keys look like to a quantizer.
    Without one its gradient is rounding noise, which AdamW would follow at full rate.
    """
    return tuple(kind for kind in kinds if quantized_attention or kind != "query_key")


@functools.cache
def warn_once(reason: str) -> None:
    log.warning("%s", reason)
