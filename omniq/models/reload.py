# SPDX-License-Identifier: Apache-2.0
"""Open an exported checkpoint through plain transformers, as any user would, but without the progress bars."""

from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, PreTrainedModel

from omniq.models.bars import without_bars


def open_checkpoint(path: str | Path, **options: Any) -> PreTrainedModel:
    """``AutoModelForCausalLM.from_pretrained``, and one token sent through: that is where the last bar would be."""
    with without_bars():
        model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(path, **options)
        with torch.no_grad():
            model(torch.zeros(1, 1, dtype=torch.int64, device=model.device), use_cache=False)
    return model
