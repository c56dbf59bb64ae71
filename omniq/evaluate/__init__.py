# SPDX-License-Identifier: Apache-2.0
"""How good a quantized model is, measured without knowing which stages made it."""

from omniq.evaluate.perplexity import Perplexity, PerplexityResult, evaluate_model, evaluate_streamed

__all__ = [
    "Perplexity",
    "PerplexityResult",
    "evaluate_model",
    "evaluate_streamed",
]
