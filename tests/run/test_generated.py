# SPDX-License-Identifier: Apache-2.0
"""Runs on text that the full-precision model writes: drawn once, kept in the run directory, read by a resumed run."""

import os
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

import omniq.run.generated as generated
from omniq.cli.command import main
from omniq.config.parse import parse_run
from omniq.data import SelfGenerated
from omniq.models.source import SourceModel
from omniq.run.generated import check_memory, generated_windows
from omniq.storage.sealed import load_tensors
from tests.helpers.runs import QUICK, SMALL, configuration, outcome, write_config, write_run

CPU = torch.device("cpu")


def sections(**settings: Any) -> dict[str, Any]:
    """A run on four windows of 12 tokens, of which one is held out."""
    source = {"class_path": "omniq.data.SelfGenerated", "init_args": settings}
    return {**QUICK, "data": {"source": source, "samples": 3, "length": 12, "held_out": 1}}


def windows_of(run: Path) -> Tensor:
    return load_tensors(run / "generated.safetensors")[0]["tokens"]


def written_without_cache(folder: Path, uniforms: Tensor, greedy: int) -> list[list[int]]:
    """The windows by a whole forward pass for each token, in float64, one window at a time."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float64)
    allowed, found = list(range(256)), []  # without <s>, </s> and the tokens that the tokenizer lacks
    for row in uniforms.tolist():
        window = [allowed[int(row[0] * len(allowed))]]
        for number in row[1:]:
            with torch.no_grad():
                probable = model(torch.tensor([window])).logits[0, -1, :256].softmax(0)
            below = probable.cumsum(0) / probable.sum()
            window.append(int(probable.argmax() if len(window) <= greedy else (below <= number).sum()))
        found.append(window)
    return found


@pytest.mark.parametrize("family", ["llama", "opt", "gemma3_text"])
def test_generated_windows_equal_windows_of_float64_without_cache(tmp_path: Path, family: str) -> None:
    write_run(tmp_path, family)
    run, _ = parse_run([], configuration(tmp_path, **sections(batch=3, greedy=2)))
    windows = generated_windows(run, SourceModel.open(tmp_path / "source"), CPU)
    uniforms = torch.rand(4, 12, dtype=torch.float64, generator=torch.Generator().manual_seed(run.seed))
    expected = written_without_cache(tmp_path / "source", uniforms, greedy=2)
    assert torch.cat([windows.calibration, windows.held_out]).tolist() == expected
    assert windows.calibration.shape == (3, 12)


def test_run_on_generated_text_killed_resumes_without_drawing_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    args = write_run(tmp_path, model=SMALL, **sections())
    assert main([*args, "--out", str(tmp_path / "whole")]) == 0
    monkeypatch.setattr("omniq.run.loop.pass_block", interrupt)
    assert main(args) == 130
    monkeypatch.undo()
    monkeypatch.setattr(generated, "_generate", None)  # a call fails
    assert main(args) == 0
    assert outcome(tmp_path / "run") == outcome(tmp_path / "whole")
    assert torch.equal(windows_of(tmp_path / "run"), windows_of(tmp_path / "whole"))


def interrupt(*_: object) -> None:
    raise KeyboardInterrupt


def test_run_on_generated_text_with_damaged_windows_draws_them_again(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    args = write_run(tmp_path, model=SMALL, **sections())
    assert main(args) == 0
    whole = windows_of(tmp_path / "run")
    path = tmp_path / "run/generated.safetensors"
    path.write_bytes(path.read_bytes()[:-1])
    assert main(args) == 0
    assert "removed, the windows are drawn again" in caplog.text
    assert torch.equal(windows_of(tmp_path / "run"), whole)


def test_run_on_generated_text_depends_on_seed_and_refuses_another(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    args = write_run(tmp_path, model=SMALL, **sections())
    assert main(args) == 0
    assert "the model has written 4 of 4 windows" in capsys.readouterr().out
    assert main([*args, "--seed", "3"]) == 2
    assert "seed (was 2, now 3)" in capsys.readouterr().err
    assert main([*args, "--seed", "3", "--out", str(tmp_path / "other")]) == 0
    assert not torch.equal(windows_of(tmp_path / "run"), windows_of(tmp_path / "other"))


def test_evaluation_on_generated_text_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    content = configuration(tmp_path, **sections())
    write_run(tmp_path, model=SMALL)
    content["evaluation"] = {"source": content["data"]["source"], "length": 12}
    assert main(write_config(tmp_path / "run.yaml", content)) == 2
    assert "omniq.data.SelfGenerated has no text to evaluate on" in capsys.readouterr().err


def test_generated_text_of_model_beyond_memory_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    args = write_run(tmp_path, **sections(batch=2))
    source = SourceModel.open(tmp_path / "source")
    stored = os.path.getsize(tmp_path / "source/model.safetensors")
    assert 0.9 * stored < source.nbytes < stored  # the file has a header
    cache = 2 * 12 * (2 * 2 * 2 * 16 * 4)  # windows, tokens; keys and values, blocks, heads, width, bytes
    monkeypatch.setattr(generated, "free_host_memory", lambda: source.nbytes + cache - 1)
    assert main(args) == 2
    errors = capsys.readouterr().err
    assert f"the whole model ({source.nbytes:,} bytes) and its cache for 2 windows ({cache:,} bytes) do not" in errors
    assert "give it as omniq.data.LocalText" in errors
    monkeypatch.setattr(generated, "free_host_memory", lambda: source.nbytes + cache)
    check_memory(parse_run([], configuration(tmp_path, **sections(batch=2)))[0].data, source, CPU)


def test_generated_text_is_described_without_the_path_of_the_model() -> None:
    assert SelfGenerated().describe().startswith("text that the full-precision model generated")
