# SPDX-License-Identifier: Apache-2.0
"""What a resume refuses, and what it accepts: changed settings, changed text, a run in use."""

import shutil
from pathlib import Path

import pytest

from omniq.cli.command import main
from omniq.storage.run_dir import RunDir
from tests.helpers.reference_run import Reference
from tests.helpers.runs import outcome


def test_run_with_other_export_settings_is_refused(
    reference: Reference, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "run"
    shutil.copytree(reference.folder / "reference", out)
    assert main([*reference.args, "--out", str(out), "--export.format", "omniq"]) == 2
    message = capsys.readouterr().err
    assert "export.format was 'compressed-tensors', now 'omniq'" in message
    assert f"omniq export --run {out} --out FOLDER --export.format omniq" in message
    assert outcome(out) == reference.outcome
    shutil.rmtree(out / "model")
    assert main([*reference.args, "--out", str(out), "--export.format", "omniq"]) == 0
    assert '"quant_method": "omniq"' in (out / "model/config.json").read_text()


def test_run_resumed_with_moved_text_continues(reference: Reference, tmp_path: Path) -> None:
    """The content of the text counts, not its path."""
    shutil.copytree(reference.folder / "reference", tmp_path / "run")
    moved = shutil.copy(reference.folder / "text.txt", tmp_path / "text.txt")
    reference.finish(tmp_path / "run", ("--data.source.init_args.path", str(moved)))


def test_run_resumed_with_changed_settings_is_refused(reference: Reference, capsys: pytest.CaptureFixture[str]) -> None:
    out = reference.folder / "reference"
    changes = ["--data.samples", "2", "--seed", "9", "--scheme.name", "W2A16g16", "--trainer.precision", "bf16-mixed"]
    assert main([*reference.args, "--out", str(out), *changes]) == 2
    message = capsys.readouterr().err
    assert message.count("\n") == 1
    for part in (
        f"out {out} holds a run with other settings",
        "data.samples (was 3, now 2)",
        "seed (was 2, now 9)",
        "scheme.name (was 'W3A16g16', now 'W2A16g16')",
        "trainer.precision (was None, now 'bf16-mixed')",
    ):
        assert part in message
    assert outcome(out) == reference.outcome


def test_run_resumed_with_changed_text_is_refused(
    reference: Reference, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The file has the same name and another content."""
    shutil.copytree(reference.folder / "reference", tmp_path / "run")
    text = reference.folder / "text.txt"
    original = text.read_text()
    text.write_text(original.upper())
    try:
        assert main([*reference.args, "--out", str(tmp_path / "run")]) == 2
    finally:
        text.write_text(original)
    assert "data digest (was " in capsys.readouterr().err


def test_run_resumed_with_damaged_fingerprint_is_refused(
    reference: Reference, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "run"
    out.mkdir()
    (out / "fingerprint.json").write_text('{"seed": 2')
    assert main([*reference.args, "--out", str(out)]) == 2
    assert f"remove {out} to start over" in capsys.readouterr().err


def test_run_in_use_by_another_process_is_refused(reference: Reference, tmp_path: Path) -> None:
    with RunDir(tmp_path / "run"):
        second = reference.attempts.run(reference.args, tmp_path / "run")
    assert second.status == 2
    assert second.output.count("\n") == 1
    assert f"out {tmp_path / 'run'} is in use by another omniq process" in second.output
    reference.finish(tmp_path / "run")


def test_run_lock_of_killed_process_is_released(reference: Reference, tmp_path: Path) -> None:
    assert reference.attempts.run(reference.args, tmp_path / "run", aim=("after", "fingerprint.json")).killed
    with RunDir(tmp_path / "run"):
        pass
