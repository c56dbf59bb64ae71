# SPDX-License-Identifier: Apache-2.0
"""The verifier names what differs in a checkpoint; tests/export/test_export.py shows that it accepts a right one."""

import random
import re
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from omniq.errors import CorruptFile
from omniq.evaluate.perplexity import evaluate_model
from omniq.export import ReopenedCheckpoint, VerificationError, find_format
from omniq.export.containers import folder_reader, huggingface
from omniq.grid.affine import Grid
from omniq.grid.scheme import Scheme
from omniq.models.source import SourceModel
from omniq.models.transformers_io import open_checkpoint
from omniq.quantizers.activations import StaticGrid
from omniq.storage.block_result import BlockResult
from tests.helpers.exported import WINDOWS, export, opened, rounded, verify
from tests.helpers.schemes import scheme_of

ENDS = torch.tensor([-3.0, 3.0])  # of a fixed range


def altered(out: Path, name: str, change: Callable[[Tensor], Tensor | None]) -> None:
    """Rewrite one tensor of a checkpoint; None removes it."""
    file = out / "model.safetensors"
    tensors = load_file(file)
    new = change(tensors.pop(name))
    save_file(tensors | ({} if new is None else {name: new}), file, metadata={"format": "pt"})


def flipped(tensor: Tensor) -> Tensor:
    """A copy with the lowest bit of the middle element flipped."""
    integers = tensor.flatten().view({2: torch.int16, 4: torch.int32}[tensor.element_size()])
    integers[len(integers) // 2] ^= 1
    return integers.view(tensor.dtype).view(tensor.shape)


@pytest.fixture
def no_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """No checkpoint can be opened in transformers; a try fails the test."""

    def refuse(path: Any) -> Any:
        raise AssertionError(f"{path} was opened")

    monkeypatch.setattr(folder_reader, "free_host_memory", lambda: 1000)
    monkeypatch.setattr(huggingface, "open_checkpoint", refuse)


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
def test_verify_changed_tensor_names_first_difference(
    name: str, change: Any, message: str, source: SourceModel, results: list[BlockResult], tmp_path: Path
) -> None:
    out = export(source, results, tmp_path / "out")
    verify(out, source, results)
    altered(out, f"model.layers.1.self_attn.q_proj.{name}", change)
    with pytest.raises(VerificationError, match=rf"model\.layers\.1\.self_attn\.{message}"):
        verify(out, source, results)


def test_verify_changed_config_norm_or_missing_tensor_is_found(
    source: SourceModel, results: list[BlockResult], tmp_path: Path
) -> None:
    out = export(source, results, tmp_path / "out")
    config = out / "config.json"
    text = config.read_text()
    config.write_text(text.replace('"rms_norm_eps": 1e-06', '"rms_norm_eps": 0.5'))
    assert config.read_text() != text
    verify(out, source, results)
    with pytest.raises(VerificationError, match="its weights are correct, but its logits differ by"):
        verify(out, source, results, windows=WINDOWS)
    altered(out, "model.norm.weight", flipped)
    with pytest.raises(VerificationError, match=r"model\.norm\.weight differ first at \[32\]"):
        verify(out, source, results)
    altered(out, "model.norm.weight", lambda _: None)
    with pytest.raises(VerificationError, match=r"model\.norm\.weight is missing in the file"):
        verify(out, source, results)


def test_verify_surplus_tensor_is_refused(source: SourceModel, results: list[BlockResult], tmp_path: Path) -> None:
    out = export(source, results, tmp_path / "out")
    file = out / "model.safetensors"
    save_file(load_file(file) | {"model.extra.weight": torch.zeros(2)}, file)
    with pytest.raises(VerificationError, match=r"model\.extra\.weight is in the files but not in the model"):
        verify(out, source, results)


def test_verify_damaged_file_is_named(source: SourceModel, results: list[BlockResult], tmp_path: Path) -> None:
    out = export(source, results, tmp_path / "out", max_shard_bytes=20_000)
    index = out / "model.safetensors.index.json"
    shard = next(out.glob("model-00002-*"))
    shard.write_bytes(shard.read_bytes()[:-10])
    with pytest.raises(CorruptFile, match=r"model-00002-of-\d+\.safetensors: .*incomplete"):
        verify(out, source, results)
    index.write_text("{")
    with pytest.raises(CorruptFile, match=r"index\.json: "):
        verify(out, source, results)
    index.unlink()
    with pytest.raises(CorruptFile, match=r"out/model\.safetensors: No such file"):
        verify(out, source, results)


@pytest.mark.parametrize("format", ["compressed-tensors", "omniq"])
@pytest.mark.parametrize("name", ["config.json", "model.safetensors.index.json", "model-00002-of-*.safetensors"])
def test_verify_random_damage_raises_only_own_errors(
    name: str, format: str, source: SourceModel, results: list[BlockResult], tmp_path: Path
) -> None:
    """A resumed run catches ``CorruptFile`` and ``VerificationError`` only."""
    out = export(source, results, tmp_path / "out", format=format, max_shard_bytes=40_000)
    file, generator, caught = next(out.glob(name)), random.Random(0), 0
    whole = file.read_bytes()
    for _ in range(40):
        damaged = bytearray(whole)
        damaged[generator.randrange(min(4000, len(whole)))] = generator.choice(b'"09aez\x00\xff')
        file.write_bytes(damaged)
        try:
            verify(out, source, results, format=format)
        except (CorruptFile, VerificationError):
            caught += 1
    assert caught >= 20  # measured: 25 or more; other edits leave the meaning as it was


# -- a machine without the memory ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("format", "scheme"),
    [
        ("compressed-tensors", Scheme("W4A16g32")),
        ("compressed-tensors", Scheme("W8A8")),
        ("compressed-tensors", Scheme("W4A8", activation_range="tensor")),
        ("omniq", Scheme("W3A16")),
        ("omniq", Scheme("W4A4KV4g32")),
    ],
)
def test_verify_checkpoint_that_does_not_fit_runs_block_by_block(
    no_memory: None, format: str, scheme: Scheme, tmp_path: Path
) -> None:
    source = opened(tmp_path / "source", scheme.grid, tie_word_embeddings=True)
    results = rounded(source, scheme.grid)
    if scheme.activations.static:
        results = [
            result.with_inputs({name: StaticGrid.fit(*ENDS, 8, False, torch.float16) for name in result.linears})
            for result in results
        ]
    out = export(source, results, tmp_path / "out", format=format, scheme=scheme)
    report = verify(out, source, results, format=format, scheme=scheme, windows=WINDOWS, tolerance=0.0)
    assert re.fullmatch(
        r"transformers needs \d\.\d GB of host memory to open it, and 0\.0 GB are free", str(report.lacking)
    )
    assert (report.windows, report.relative_error) == (2, 0.0)
    expected = evaluate_model(open_checkpoint(out), WINDOWS).perplexity
    assert report.perplexity == pytest.approx(expected, rel=1e-6)  # measured: 0.0


def test_verify_wrong_config_block_by_block_is_found(
    no_memory: None, source: SourceModel, results: list[BlockResult], tmp_path: Path
) -> None:
    out = export(source, results, tmp_path / "out")
    config = out / "config.json"
    config.write_text(config.read_text().replace('"rms_norm_eps": 1e-06', '"rms_norm_eps": 0.5'))
    with pytest.raises(VerificationError, match="its weights are correct, but its logits differ by"):
        verify(out, source, results, windows=WINDOWS)


def test_verify_block_by_block_holds_one_block(
    no_memory: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """This holds for source and checkpoint, and for blocks and results."""
    grid = Grid(4, 32)
    source = opened(tmp_path / "source", grid, num_hidden_layers=4)
    results = rounded(source, grid)
    out = export(source, results, tmp_path / "out")
    alive: weakref.WeakSet[Any] = weakref.WeakSet()
    most: list[int] = []
    plain = SourceModel.block

    def block(model: SourceModel, *args: Any, **kwargs: Any) -> Any:
        most.append(len(alive))
        block = plain(model, *args, **kwargs)
        alive.add(block)
        return block

    monkeypatch.setattr(SourceModel, "block", block)
    verify(out, source, results, windows=WINDOWS)
    assert most == [0] * 8


@pytest.mark.parametrize("format", ["compressed-tensors", "omniq"])
def test_reopened_checkpoint_opens_model_where_memory_suffices(
    format: str, source: SourceModel, results: list[BlockResult], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """compressed-tensors needs stored and deployed weights; omniq needs the stored ones and one linear."""
    out = export(source, results, tmp_path / "out", format=format, max_shard_bytes=20_000)
    chosen, stored = find_format(format), sum(path.stat().st_size for path in out.glob("*.safetensors"))
    weights = sum(value.numel() for value in open_checkpoint(tmp_path / "source").parameters())
    largest = 272 * 64  # the head
    expected = stored + (2 * weights if format == "compressed-tensors" else 20 * largest)
    codec = chosen.codec(scheme_of(Grid(4, 32)))
    assert folder_reader.needed_memory(out, codec.stays_packed) == expected
    for free, fits in ((int(1.1 * expected), True), (int(1.1 * expected) - 1, False)):
        monkeypatch.setattr(folder_reader, "free_host_memory", lambda free=free: free)
        opened = ReopenedCheckpoint(out, chosen.container, codec)
        assert (opened.model is not None) == (opened.lacking is None) == fits
        assert opened.model is opened.model
