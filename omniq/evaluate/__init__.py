# SPDX-License-Identifier: Apache-2.0
"""Evaluation: the quality of a quantized model, measured independently of the stages that made it.

Each name is imported on first use: ``omniq report`` reads results and needs no torch.
"""

from typing import TYPE_CHECKING

from omniq.lazy import lazy_names

if TYPE_CHECKING:
    from omniq.evaluate.perplexity import Perplexity, evaluate_model, evaluate_streamed
    from omniq.evaluate.result import PerplexityResult
else:  # hidden from type checkers, for which a module-level __getattr__ defines every name
    __getattr__ = lazy_names(
        __name__,
        {
            "Perplexity": "omniq.evaluate.perplexity",
            "PerplexityResult": "omniq.evaluate.result",
            "evaluate_model": "omniq.evaluate.perplexity",
            "evaluate_streamed": "omniq.evaluate.perplexity",
        },
    )

__all__ = [
    "Perplexity",
    "PerplexityResult",
    "evaluate_model",
    "evaluate_streamed",
]
