# SPDX-License-Identifier: Apache-2.0
"""GGUF files give the same model as transformers, without its progress bars; unreadable files are refused."""

import importlib.util
import sys
import threading
import warnings
from pathlib import Path
from unittest.mock import Mock

import gguf
import pytest
import torch
from tqdm.auto import tqdm
from transformers import AutoModelForCausalLM

from omniq.models import locate
from omniq.models.gguf import reading_gguf
from omniq.models.no_progress_bars import without_bars
from omniq.models.source import SourceModel
from tests.helpers.opening import SMOL, needs_smol, refused, stream


@needs_smol
@pytest.mark.slow
def test_gguf_model_equals_transformers_and_is_parsed_once(
    capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Config, weights and tokenizer come from one parse of the file."""
    reader = Mock(wraps=gguf.GGUFReader)
    monkeypatch.setattr(gguf, "GGUFReader", reader)
    source = SourceModel.open(SMOL)
    tokenizer = source.tokenizer()
    assert reader.call_count == 1
    assert gguf.GGUFReader is reader
    assert capfd.readouterr() == ("", "")
    assert source.dtype == torch.float32
    assert (source.num_blocks, source.family.blocks) == (30, "model.layers")
    model = AutoModelForCausalLM.from_pretrained(
        source.folder, gguf_file=Path(SMOL).name, config=source.config, dtype=torch.float32
    )
    reference = model.model.layers[0].state_dict()
    block = source.block(0).state_dict()
    assert all(torch.equal(block[name], value) for name, value in reference.items())
    assert [name for name, _ in source.outside()] == ["model.embed_tokens.weight", "model.norm.weight"]
    ids = tokenizer("Hello world", return_tensors="pt")["input_ids"]
    assert ids.tolist() == [[19556, 905]]
    with torch.no_grad():
        assert torch.equal(stream(source, ids), model(ids).logits)
    assert len(source.digest()) == 64


def test_gguf_unreadable_file_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "x.gguf"
    file.write_bytes(b"no such format" * 10)
    refused(file, r"x.gguf cannot be read as a GGUF model \(.*\): get the file again")
    find_spec = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "gguf" else find_spec(name))
    refused(file, "reading .*x.gguf needs the packages gguf: pip install gguf")


@needs_smol
@pytest.mark.parametrize("size", [1000, pytest.param(1 << 22, marks=pytest.mark.slow)])
def test_gguf_truncated_file_is_refused(tmp_path: Path, size: int) -> None:
    folder, name = locate.locate(SMOL)
    with (folder / str(name)).open("rb") as complete:
        (tmp_path / "x.gguf").write_bytes(complete.read(size))
    refused(tmp_path / "x.gguf", r"x.gguf cannot be read as a GGUF model \(.*\): get the file again")


def test_without_bars_hides_bars_inside_only(capfd: pytest.CaptureFixture[str]) -> None:
    """Contexts may be nested. Bars appear again afterwards, also after an error."""

    def bar() -> str:
        assert list(tqdm(range(3), desc="reading", disable=False)) == [0, 1, 2]
        return capfd.readouterr().err

    assert "reading" in bar()
    with without_bars():
        assert bar() == ""
        with without_bars():
            assert bar() == ""
        assert bar() == ""
        print("printed", file=sys.stderr)
        with pytest.warns(UserWarning, match="warned"):
            warnings.warn("warned", stacklevel=1)
        assert capfd.readouterr().err == "printed\n"
    assert "reading" in bar()
    with pytest.raises(ZeroDivisionError), without_bars():
        _ = 1 / 0
    assert "reading" in bar()


def test_reading_gguf_in_overlapping_threads_restores_package(tmp_path: Path) -> None:
    """One thread begins before another one ends, and ends after it."""
    plain, begun, end = gguf.GGUFReader, threading.Event(), threading.Event()

    def read() -> None:
        with reading_gguf(tmp_path / "other.gguf"):
            begun.set()
            end.wait()

    thread = threading.Thread(target=read)
    with reading_gguf(tmp_path / "one.gguf"):
        thread.start()
        begun.wait(0.2)
    end.set()
    thread.join()
    assert gguf.GGUFReader is plain
