# SPDX-License-Identifier: Apache-2.0
"""Nothing of the user's is written over or removed: what counts as a run's own folder, and what a run sweeps there."""

from pathlib import Path

import pytest

from omniq.cli.command import main
from omniq.errors import UserError
from omniq.storage.ownership import check_empty_or_run, check_writable
from omniq.storage.run_dir import RunDir
from tests.helpers.runs import QUICK, configuration, write_config

STRANGERS = ["current/mine", "sub/.other.partial", "blocks/000.safetensors", "config.yaml", ".hidden", "model/mine"]


def files(folder: Path) -> dict[Path, bytes | None]:
    return {path: path.read_bytes() if path.is_file() else None for path in folder.rglob("*")}


@pytest.mark.parametrize("name", STRANGERS)
def test_a_folder_of_the_user_is_refused_and_left_alone(
    name: str, folder: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "project"
    (out / name).parent.mkdir(parents=True)
    (out / name).write_text("mine")
    before = files(out)
    capfd.readouterr()
    assert main(["quantize", "--config", str(folder / "run.yaml"), "--out", str(out)]) == 2
    said = capfd.readouterr()
    first = name if name.startswith(("current", "blocks")) else name.partition("/")[0]
    assert said.err == (
        f"omniq: out {out} holds {first} and no fingerprint.json, so it is not a run directory: "
        "choose an empty or new folder\n"
    )
    assert said.out == ""
    with pytest.raises(UserError, match="choose an empty or new folder"), RunDir(out):
        pass
    assert files(out) == before


def test_the_working_directory_is_refused(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """It is what an empty ``out`` means, such as that of a shell variable without a value."""
    monkeypatch.chdir(tmp_path)
    for out in ("", ".", "./"):
        assert main(["quantize", "--config", str(folder / "run.yaml"), "--out", out]) == 2
        assert "out is empty or '.', the working directory: give the run a folder of its own" in capfd.readouterr().err
    assert not list(tmp_path.iterdir())


def test_what_a_run_has_made_before_its_fingerprint_is_its_own(tmp_path: Path) -> None:
    with RunDir(tmp_path / "run"):
        pass
    (tmp_path / "run/.fingerprint.json.partial").write_text('{"seed"')
    check_writable(tmp_path / "run")
    with RunDir(tmp_path / "run") as run:
        assert not run.claim({"seed": 2}, "seed: 2")
    assert sorted(path.name for path in (tmp_path / "run").iterdir()) == [
        "blocks",
        "config.yaml",
        "current",
        "fingerprint.json",
        "lock",
    ]
    check_empty_or_run(tmp_path / "run")
    check_empty_or_run(tmp_path / "nothing")


def test_only_own_leftovers_are_swept(tmp_path: Path) -> None:
    """In a run's folder, too: a name that omniq never writes is the user's."""
    with RunDir(tmp_path) as run:
        run.claim({}, "")
    ours = [".streams.safetensors.partial", ".summary.json.partial", "blocks/.000.safetensors.partial"]
    theirs = [".mine.partial", "sub/.other.partial", "tensorboard/.x.partial", "model/.y.partial"]
    for name in ours + theirs:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(b"half")
    with RunDir(tmp_path):
        assert not any((tmp_path / name).exists() for name in ours)
        assert all((tmp_path / name).exists() for name in theirs)


def test_files_beside_a_run_outlive_it(folder: Path, tmp_path: Path) -> None:
    args = write_config(tmp_path / "run.yaml", configuration(folder, **QUICK, stages=[{"class_path": "RTN"}]))
    args += ["--out", str(tmp_path / "run")]
    assert main(args) == 0
    for name in ("notes", "sub/.other.partial"):
        (tmp_path / "run" / name).parent.mkdir(exist_ok=True)
        (tmp_path / "run" / name).write_text("mine")
    (tmp_path / "run/blocks/001.safetensors").unlink()
    assert main(args) == 0
    assert (tmp_path / "run/notes").read_text() == (tmp_path / "run/sub/.other.partial").read_text() == "mine"
