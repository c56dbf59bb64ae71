# SPDX-License-Identifier: Apache-2.0
"""Open an exported checkpoint through plain transformers, as any user would, but without the progress bars.

compressed-tensors shows three bars for every model it opens and one more when that model runs for the first time, and
takes no argument to leave them out. Hence the run on one token.
"""

import io
from contextlib import redirect_stderr
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, PreTrainedModel


def open_checkpoint(path: str | Path, **options: Any) -> PreTrainedModel:
    """``AutoModelForCausalLM.from_pretrained``; errors and logged warnings come through."""
    with redirect_stderr(io.StringIO()):
        model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(path, **options)
        with torch.no_grad():
            model(torch.zeros(1, 1, dtype=torch.int64, device=model.device), use_cache=False)
    return model
