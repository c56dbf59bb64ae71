# SPDX-License-Identifier: Apache-2.0
"""What a measurement of perplexity found, and its form in JSON; needs no torch."""

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any


@dataclass(frozen=True)
class PerplexityResult:
    """What was measured.

    Args:
        perplexity: ``exp(nll)``; infinite where that overflows.
        nll: mean negative log-likelihood of a token, in nats.
        tokens: number of predicted tokens, ``m (t - 1)``.
        windows: number of windows, ``m``.
        seconds: wall time of the pass that measured it; variants of one streamed pass share it.
    """

    perplexity: float
    nll: float
    tokens: int
    windows: int
    seconds: float

    def to_json(self) -> dict[str, float | int | None]:
        """The fields, None where a number is not finite (JSON has no infinity)."""
        return {name: value if math.isfinite(value) else None for name, value in asdict(self).items()}

    @classmethod
    def from_json(cls, fields: Mapping[str, Any]) -> "PerplexityResult":
        """Read what ``to_json`` gave; a perplexity that was not finite comes back as infinity or as not a number."""
        if fields["nll"] is None:
            return cls(**{**fields, "perplexity": math.nan, "nll": math.nan})
        return cls(**{**fields, "perplexity": math.inf if fields["perplexity"] is None else fields["perplexity"]})
