# SPDX-License-Identifier: Apache-2.0
"""The verifier passes what is right (tests/test_export.py) and names what is not."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from exported import CARD, WINDOWS
from safetensors.torch import load_file, save_file
from torch import Tensor

from omniq.errors import UserError
from omniq.export import VerificationError, export_checkpoint, verify_checkpoint
from omniq.files import CorruptFile
from omniq.models.source import SourceModel
from omniq.result import BlockResult


def altered(out: Path, name: str, change: Callable[[Tensor], Tensor | None]) -> None:
    """Rewrite one tensor of a checkpoint; None removes it."""
    file = out / "model.safetensors"
    tensors = load_file(file)
    new = change(tensors.pop(name))
    save_file(tensors | ({} if new is None else {name: new}), file, metadata={"format": "pt"})


def flipped(tensor: Tensor) -> Tensor:
    """The lowest bit of the element in the middle, flipped."""
    integers = tensor.flatten().view({2: torch.int16, 4: torch.int32}[tensor.element_size()])
    integers[len(integers) // 2] ^= 1
    return integers.view(tensor.dtype).view(tensor.shape)


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("weight_packed", flipped, r"q_proj: codes differ first at \[32, 0\]: \d+ in the file, \d+ in the model"),
        ("weight_scale", flipped, r"q_proj: scale differ first at \[32, 0\]"),
        ("weight_zero_point", flipped, r"q_proj: zero_point differ first at \[32, 0\]"),
        ("weight_scale", lambda _: None, r"q_proj\.weight_scale is missing in the file"),
        (
            "weight_packed",
            lambda t: t[:, :4].contiguous(),
            "q_proj cannot be read back: 64 codes of 4 bits take 8 words",
        ),
        ("weight_scale", lambda t: t.float(), r"q_proj: scale is torch\.float32 \[64, 2\] in the file"),
    ],
)
def test_verifier_names_the_first_difference(
    name: str, change: Any, message: str, source: SourceModel, results: list[BlockResult], tmp_path: Path
) -> None:
    out = export_checkpoint(source, results, tmp_path / "out", card=CARD)
    verify_checkpoint(out, source, results)
    altered(out, f"model.layers.1.self_attn.q_proj.{name}", change)
    with pytest.raises(VerificationError, match=rf"model\.layers\.1\.self_attn\.{message}"):
        verify_checkpoint(out, source, results)


def test_verifier_sees_everything_else(source: SourceModel, results: list[BlockResult], tmp_path: Path) -> None:
    out = export_checkpoint(source, results, tmp_path / "out", card=CARD)
    with pytest.raises(UserError, match="1 blocks are finished of 2"):
        verify_checkpoint(out, source, results[:1])
    config = out / "config.json"
    text = config.read_text()
    config.write_text(text.replace('"rms_norm_eps": 1e-06', '"rms_norm_eps": 0.5'))
    assert config.read_text() != text
    verify_checkpoint(out, source, results)
    with pytest.raises(VerificationError, match="its weights are right, but its logits are off by"):
        verify_checkpoint(out, source, results, windows=WINDOWS)
    altered(out, "model.norm.weight", flipped)
    with pytest.raises(VerificationError, match=r"model\.norm\.weight differ first at \[32\]"):
        verify_checkpoint(out, source, results)
    altered(out, "model.norm.weight", lambda _: None)
    with pytest.raises(VerificationError, match=r"model\.norm\.weight is missing in the file"):
        verify_checkpoint(out, source, results)


def test_verifier_refuses_surplus_tensors(source: SourceModel, results: list[BlockResult], tmp_path: Path) -> None:
    out = export_checkpoint(source, results, tmp_path / "out", card=CARD)
    file = out / "model.safetensors"
    save_file(load_file(file) | {"model.extra.weight": torch.zeros(2)}, file)
    with pytest.raises(VerificationError, match=r"model\.extra\.weight is in the file but not in the model"):
        verify_checkpoint(out, source, results)


def test_damaged_files_are_named(source: SourceModel, results: list[BlockResult], tmp_path: Path) -> None:
    out = export_checkpoint(source, results, tmp_path / "out", card=CARD, max_shard_bytes=20_000)
    index = out / "model.safetensors.index.json"
    shard = next(out.glob("model-00002-*"))
    shard.write_bytes(shard.read_bytes()[:-10])
    with pytest.raises(CorruptFile, match=r"model-00002-of-\d+\.safetensors: .*incomplete"):
        verify_checkpoint(out, source, results)
    index.write_text("{")
    with pytest.raises(CorruptFile, match=r"index\.json: "):
        verify_checkpoint(out, source, results)
    index.unlink()
    with pytest.raises(CorruptFile, match=r"out/model\.safetensors: No such file"):
        verify_checkpoint(out, source, results)
