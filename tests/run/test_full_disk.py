# SPDX-License-Identifier: Apache-2.0
"""A disk that fills up while a run saves its streams or writes ``model/``: one line, and the same command goes on."""

import errno
import os
from pathlib import Path

import pytest

from omniq.cli.command import main
from tests.helpers.runs import QUICK, SMALL, omniquant, write_run

MOMENTS = [
    ".streams.safetensors.partial",
    ".model.partial/..omniq-export.json.partial",
    ".model.partial/model.safetensors",
    ".model.partial/tokenizer.json",
]


@pytest.mark.parametrize("name", MOMENTS)
def test_run_on_a_full_disk_ends_in_one_line_and_goes_on(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    args = write_run(tmp_path, model=SMALL, **{**QUICK, "stages": [omniquant()], "export": {"format": "omniq"}})
    run, real, failed = tmp_path / "run", os.fsync, []

    def full(handle: int) -> None:
        file = run / name
        if file.exists() and os.fstat(handle).st_ino == file.stat().st_ino:
            failed.append(name)
            raise OSError(errno.ENOSPC, "No space left on device")
        real(handle)

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        assert main(args) == 2
    said = capfd.readouterr().err.splitlines()[-1]
    assert failed == [name]
    assert said.startswith(f"omniq: cannot write {run}")
    assert "No space left on device" in said
    assert "choose another folder" in said
    assert not [path for path in run.rglob("*") if "partial" in path.name]
    assert not (run / "model").exists()
    done = {path.name: path.stat().st_ino for path in (run / "blocks").glob("*.safetensors")}
    assert len(done) == (2 if "model" in name else 1)
    assert main(args) == 0
    again = {path.name: path.stat().st_ino for path in (run / "blocks").glob("*.safetensors")}
    assert again.items() >= done.items()  # no finished block was computed again
    assert len(again) == 2
    assert (run / "model/config.json").is_file()
