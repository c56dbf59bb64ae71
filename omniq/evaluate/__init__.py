# SPDX-License-Identifier: Apache-2.0
"""How good a quantized model is, measured without knowing which stages made it."""

from omniq.evaluate.perplexity import Perplexity, PerplexityResult, evaluate_model, evaluate_streamed
from omniq.evaluate.table import perplexity_table, write_results

__all__ = [
    "Perplexity",
    "PerplexityResult",
    "evaluate_model",
    "evaluate_streamed",
    "perplexity_table",
    "write_results",
]
