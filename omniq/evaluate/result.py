# SPDX-License-Identifier: Apache-2.0
"""The result of a perplexity measurement, and its form in JSON; this module does not import torch."""

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any


@dataclass(frozen=True)
class PerplexityResult:
    """The result of a perplexity measurement.

    Args:
        perplexity: ``exp(nll)``; infinite on overflow.
        nll: mean negative log-likelihood of a token, in nats.
        tokens: number of predicted tokens, ``m (t - 1)``.
        windows: number of windows, ``m``.
        seconds: wall time of the measurement; variants of one streamed pass share it.
    """

    perplexity: float
    nll: float
    tokens: int
    windows: int
    seconds: float

    def to_json(self) -> dict[str, float | int | None]:
        """The fields by name; None for a number that is not finite (JSON has no infinity)."""
        return {name: value if math.isfinite(value) else None for name, value in asdict(self).items()}

    @classmethod
    def from_json(cls, fields: Mapping[str, Any]) -> "PerplexityResult":
        """Invert ``to_json``; a perplexity of None becomes infinity, or NaN if ``nll`` is None too."""
        if fields["nll"] is None:
            return cls(**{**fields, "perplexity": math.nan, "nll": math.nan})
        return cls(**{**fields, "perplexity": math.inf if fields["perplexity"] is None else fields["perplexity"]})
