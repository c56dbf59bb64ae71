# SPDX-License-Identifier: Apache-2.0
"""The end of a run: evaluation, export, verification, and the messages about them."""

import json
import re
import sys
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from omniq.blocks import placement
from omniq.cli.command import main
from omniq.errors import UserError
from omniq.export.containers import folder_reader, huggingface
from omniq.export.formats.compressed_tensors import CompressedTensors
from omniq.run import checkpoint, environment
from omniq.storage.block_result import QuantizedLinear
from tests.helpers.runs import SMALL, configuration, omniquant, outcome, write_run

RTN = [{"class_path": "omniq.stages.RTN"}]


def said(capsys: pytest.CaptureFixture[str]) -> str:
    """The captured output in one line."""
    return re.sub(r"\s+", " ", capsys.readouterr().out)


@pytest.fixture
def openings(monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    """The checkpoints that transformers opens, in order."""
    paths: list[Path] = []
    plain = huggingface.open_checkpoint

    def spy(path: Path) -> Any:
        paths.append(path)
        return plain(path)

    monkeypatch.setattr(huggingface, "open_checkpoint", spy)
    return paths


def no_compressed_tensors(name: str) -> str:
    if name == "compressed-tensors":
        raise PackageNotFoundError(name)
    return version(name)


@pytest.mark.parametrize("verify", [True, False])
def test_finish_opens_checkpoint_once(
    openings: list[Path], verify: bool, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Logits, perplexity of a window and the prompt use the same opened model."""
    args = write_run(tmp_path, scheme={"name": "W8A8"}, stages=RTN)
    args += ["--export.prompt", "Once upon", "--export.verify", str(verify)]
    assert main(args) == 0
    assert openings == [tmp_path / "run/model"]
    output = said(capsys)
    assert "the checkpoint says: 'Once upon" in output
    assert ("perplexity of 24 tokens" in output) == verify  # a window of the evaluation
    first = outcome(tmp_path / "run")
    assert main(args) == 0  # finished: opened once more
    assert len(openings) == 2
    assert outcome(tmp_path / "run") == first


def test_finish_without_evaluation_verifies_on_own_text(
    openings: list[Path], tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    assert main(write_run(tmp_path, scheme={"name": "W8A8"}, stages=RTN, evaluation=None)) == 0
    assert f"perplexity of {len(checkpoint.VERIFICATION_TEXT)} tokens" in said(capsys)  # of bytes


@pytest.mark.parametrize("scheme", ["W4A16", "W8A8"])
def test_finish_checkpoint_that_does_not_fit_is_verified_block_by_block(
    openings: list[Path], scheme: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    """One line says which checks were not possible."""
    monkeypatch.setattr(folder_reader, "free_host_memory", lambda: 1000)
    args = write_run(tmp_path, scheme={"name": scheme}, stages=RTN)
    assert main([*args, "--export.prompt", "Once upon"]) == 0
    output, lacking = said(capsys), r"transformers needs 0\.0 GB of host memory to open it, and 0\.0 GB are free"
    assert re.search(rf"logits block by block within 0\.0e\+00 of omniq's \({lacking}\)", output)
    assert ("by omniq's own evaluation" in output) == (scheme == "W8A8")
    assert re.search(f"the checkpoint does not complete the prompt: {lacking}", output)
    assert openings == []


def test_run_without_readers_package_says_so_and_resumes_without_writing(
    openings: list[Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture,
    caplog: pytest.LogCaptureFixture,
) -> None:
    monkeypatch.setitem(sys.modules, "compressed_tensors", None)
    monkeypatch.setattr(environment, "version", no_compressed_tensors)
    lacking = (
        "transformers needs compressed-tensors>=0.18 to open it, which this environment lacks "
        "(pip install 'compressed-tensors>=0.18')"
    )
    args = write_run(tmp_path, stages=RTN)
    for start in ("first", "resumed"):
        caplog.clear()
        assert main([*args, "--export.prompt", "Once upon"]) == 0
        assert [f"export.format compressed-tensors: {lacking}; omniq verifies the checkpoint with its own reader"] == [
            record.getMessage() for record in caplog.records if "pip install" in record.getMessage()
        ]
        output = said(capsys)
        assert f"logits block by block within 0.0e+00 of omniq's ({lacking})" in output
        assert f"the checkpoint does not complete the prompt: {lacking}" in output
        assert ("writing" in output) == (start == "first")
    assert openings == []


def test_run_with_values_that_format_cannot_store_ends_at_their_block(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    def refuse(codec: CompressedTensors, name: str, linear: QuantizedLinear) -> None:
        if linear.zero_point.max() > 1:
            raise UserError(f"{name} has a zero point above 1: use format omniq")

    monkeypatch.setattr(CompressedTensors, "check_linear", refuse)
    assert main(write_run(tmp_path, scheme={"name": "W2A16g16"}, stages=RTN)) == 2
    assert "model.layers.0.self_attn.q_proj has a zero point above 1: use format omniq" in capsys.readouterr().err
    assert not list((tmp_path / "run/blocks").glob("*.safetensors"))


def test_resume_replaces_damaged_export_only(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    """An error of the machine is not damage: it ends the run and keeps the export."""
    args = write_run(tmp_path, stages=RTN, evaluation=None)
    assert main(args) == 0
    before = (tmp_path / "run/model/model.safetensors").stat().st_ino

    def fail(path: Path) -> Any:
        raise MemoryError("of the machine")

    with monkeypatch.context() as patched:
        patched.setattr(huggingface, "open_checkpoint", fail)
        with pytest.raises(MemoryError, match="of the machine"):
            main(args)
    assert (tmp_path / "run/model/model.safetensors").stat().st_ino == before
    assert main(args) == 0
    assert "writing" not in said(capsys).partition("verified")[2]


def test_resume_keeps_export_of_older_version(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    """Its config.json names the method only, and not the format."""
    args = write_run(tmp_path, stages=RTN, evaluation=None, export={"format": "omniq"})
    assert main(args) == 0
    config, weights = tmp_path / "run/model/config.json", tmp_path / "run/model/model.safetensors"
    content = json.loads(config.read_text())
    del content["omniq_format"]
    config.write_text(json.dumps(content))
    before = weights.stat().st_ino
    said(capsys)
    assert main(args) == 0
    assert "writing" not in said(capsys)
    assert weights.stat().st_ino == before


def test_finish_other_perplexity_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checkpoint, "in_export_dtype", lambda source, scheme: source.in_dtype(torch.bfloat16))
    monkeypatch.setattr(checkpoint, "PERPLEXITY_TOLERANCE", 1e-6)
    with pytest.raises(checkpoint.VerificationError, match=r"not the model that was measured: perplexity of 24 tokens"):
        main(write_run(tmp_path, scheme={"name": "W4A4"}, stages=RTN))


@pytest.mark.parametrize("place", ["device", "host", "disk"])
def test_evaluation_of_run_places_activations_as_calibration_does(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, place: str
) -> None:
    """This holds for all three variants, and no file remains afterwards."""
    args = write_run(tmp_path, model=SMALL, stages=[omniquant()], export={"format": "none"})
    rooms: list[tuple[str, int]] = []
    plain = placement.ActivationPlacement.empty

    def spy(chosen: placement.ActivationPlacement, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        rooms.append((chosen.location, shape[0]))
        return plain(chosen, shape, dtype)

    monkeypatch.setattr(placement.ActivationPlacement, "empty", spy)
    assert main([*args, "--streams", place]) == 0
    assert rooms == [(place, 4), *[(place, 4)] * 3]  # samples with one held out; windows, for each variant
    assert not list((tmp_path / "run").glob("stream.*"))


def test_evaluation_of_run_too_large_for_host_goes_to_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The three activations of the evaluation do not fit; the smaller ones of the calibration do."""
    longer = configuration(tmp_path)["evaluation"] | {"max_windows": 40}
    args = write_run(tmp_path, model=SMALL, stages=RTN, evaluation=longer, export={"format": "none"})
    one = 4 * 24 * SMALL["hidden_size"] * 4  # bytes of a stream
    monkeypatch.setattr(placement, "free_host_memory", lambda: 2 * 10 * one)
    places: list[str] = []
    plain = placement.ActivationPlacement.choose.__func__  # type: ignore[attr-defined]

    def spy(*args: Any, **kwargs: Any) -> placement.ActivationPlacement:
        chosen: placement.ActivationPlacement = plain(*args, **kwargs)
        places.append(chosen.location)
        return chosen

    monkeypatch.setattr(placement.ActivationPlacement, "choose", classmethod(spy))
    assert main(args) == 0
    assert places == ["host", "disk"]
