# SPDX-License-Identifier: Apache-2.0
"""A run writes into its own folder only, and removes nothing of the user."""

import os
import shutil
from pathlib import Path

import pytest

from omniq.cli.command import main
from omniq.errors import UserError
from omniq.storage.ownership import check_empty_or_run, check_writable
from omniq.storage.run_dir import RunDir
from tests.helpers.runs import QUICK, SMALL, configuration, write_config, write_run

STRANGERS = ["current/mine", "sub/.other.partial", "blocks/000.safetensors", "config.yaml", ".hidden", "model/mine"]


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> tuple[list[str], Path]:
    """The command line of a run that has ended, without its ``--out``, and its folder."""
    folder = tmp_path_factory.mktemp("finished")
    args = write_run(folder, model=SMALL, stages=[{"class_path": "RTN"}])
    assert main([*args, "--out", str(folder / "run")]) == 0
    return args, folder / "run"


def files(folder: Path) -> dict[Path, bytes | None]:
    return {path: path.read_bytes() if path.is_file() else None for path in folder.rglob("*")}


@pytest.mark.parametrize("name", STRANGERS)
def test_run_in_folder_of_user_is_refused_and_left_unchanged(
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


def test_run_in_working_directory_is_refused(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """An empty ``out`` means the working directory, for example from an unset shell variable."""
    monkeypatch.chdir(tmp_path)
    for out in ("", ".", "./"):
        assert main(["quantize", "--config", str(folder / "run.yaml"), "--out", out]) == 2
        assert "out is empty or '.', the working directory: give the run a folder of its own" in capfd.readouterr().err
    assert not list(tmp_path.iterdir())


def test_run_dir_without_fingerprint_owns_its_files(tmp_path: Path) -> None:
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


def test_run_dir_removes_own_leftovers_only(tmp_path: Path) -> None:
    """A name that omniq never writes belongs to the user, also in a run directory."""
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


def test_run_keeps_files_of_user(folder: Path, tmp_path: Path) -> None:
    args = write_config(tmp_path / "run.yaml", configuration(folder, **QUICK, stages=[{"class_path": "RTN"}]))
    args += ["--out", str(tmp_path / "run")]
    assert main(args) == 0
    for name in ("notes", "sub/.other.partial"):
        (tmp_path / "run" / name).parent.mkdir(exist_ok=True)
        (tmp_path / "run" / name).write_text("mine")
    (tmp_path / "run/blocks/001.safetensors").unlink()
    assert main(args) == 0
    assert (tmp_path / "run/notes").read_text() == (tmp_path / "run/sub/.other.partial").read_text() == "mine"


def test_commands_leave_the_users_files_and_other_runs_alone(
    folder: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """Exports into a run directory, runs inside another one, and strange files in ``blocks`` and ``current``."""
    args = write_config(tmp_path / "run.yaml", configuration(folder, **QUICK, stages=[{"class_path": "RTN"}]))
    run = tmp_path / "run"
    assert main([*args, "--out", str(run)]) == 0
    mine = [run / "current/notes.txt", run / "current/7.bak", run / "blocks/.mine.partial", run / "blocks/photo.jpg"]
    for path in mine:
        path.write_text("mine")
    before = files(run)
    for out in (run, run / "current", run / "blocks", run / "blocks/new", run / "tensorboard", run / "model/new"):
        capfd.readouterr()
        assert main(["export", "--run", str(run), "--out", str(out)]) == 2
        assert f"export to {out}: it belongs to the run in {run}; choose a folder of its own" in capfd.readouterr().err
        if out != run:
            assert main([*args, "--out", str(out)]) == 2
            assert f"out {out}: it belongs to the run in {run}" in capfd.readouterr().err
    assert main(["export", "--run", str(run), "--out", "/"]) == 2
    assert "it is the root of the file system; choose an empty or new folder" in capfd.readouterr().err
    assert files(run) == before
    assert main([*args, "--out", str(run)]) == 0
    assert all(path.read_text() == "mine" for path in mine)


def test_run_out_beyond_the_limit_of_names_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "ring").symlink_to(tmp_path / "ring")
    for out in ("a" * 300, "/".join(["b" * 200] * 30), "c\0"):
        with pytest.raises(UserError, match=r"out .* cannot be written: .*; choose another folder") as refused:
            check_writable(tmp_path / out)
        assert "\n" not in str(refused.value)


def test_check_writable_unusable_place_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=f"out .* cannot be written: {tmp_path / 'file'} is a file; choose"):
        check_writable(tmp_path / "file/run")
    check_writable(tmp_path / "new/run")
    assert not (tmp_path / "new").exists()
    monkeypatch.setattr(os, "access", lambda *_: False)
    with pytest.raises(UserError, match=f"out .* cannot be written: no permission in {tmp_path}; choose"):
        check_writable(tmp_path / "new/run")


@pytest.mark.parametrize("entry", ["blocks/000.safetensors", "blocks/001.safetensors", "perplexity.json", "blocks"])
@pytest.mark.parametrize("kind", ["dangling link", "link", "wrong type"])
def test_commands_refuse_entry_of_wrong_type_in_one_line(
    entry: str, kind: str, finished: tuple[list[str], Path], tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """The commands refuse the entry before they read the run, and leave it as it is."""
    args, run = finished[0], tmp_path / "run"
    shutil.copytree(finished[1], run)
    path = run / entry
    folder = path.is_dir()
    path.rename(tmp_path / "moved")
    if kind == "wrong type":
        path.write_text("") if folder else path.mkdir()
    else:
        path.symlink_to(tmp_path / ("absent" if kind == "dangling link" else "moved"))
    what = "a link" if "link" in kind else "a file" if folder else "a folder"
    tuning = ["--stages", f"[{{class_path: FromCheckpoint, init_args: {{path: '{run}'}}}}, {{class_path: EndToEnd}}]"]
    for command in (
        [*args, "--out", str(run)],
        [*args, *tuning, "--out", str(tmp_path / "tuned")],
        ["export", "--run", str(run), "--out", str(tmp_path / "out")],
        ["report", "--run", str(run)],
    ):
        capfd.readouterr()
        assert main(command) == 2
        kept = "file" if not folder else "folder"
        assert capfd.readouterr().err == f"omniq: {path} is {what}, but the run keeps a {kept} there: move it away\n"
    assert path.is_symlink() == ("link" in kind)
    assert not (tmp_path / "out").exists()
