# SPDX-License-Identifier: Apache-2.0
"""Seals bind a file to its run and to its place there; locks; entries that are no files."""

import errno
import fcntl
import os
import shutil
from pathlib import Path

import pytest
import torch

from omniq.cli import main
from omniq.errors import CorruptFile, UserError
from omniq.grid.affine import Grid
from omniq.storage.block_result import BlockResult, QuantizedLinear
from omniq.storage.claim import identity, read_fingerprint
from omniq.storage.lock import lock
from omniq.storage.ownership import check_entries
from omniq.storage.run_dir import RunDir
from omniq.storage.sealed import Owner, load_state, save_state
from tests.helpers.runs import QUICK, SMALL, outcome, write_run


def result(seed: int = 0) -> BlockResult:
    weight = torch.randn(8, 32, generator=torch.Generator().manual_seed(seed))
    grid = Grid(4)
    scale, zero = grid.fit(*grid.range(weight))
    linear = QuantizedLinear.of(grid, grid.quantize(weight, scale, zero), scale, zero)
    return BlockResult({"q": linear}, {"norm.weight": torch.ones(4)})


def test_quantized_linear_stores_contiguous_tensors() -> None:
    codes = torch.randint(0, 15, (32, 8), dtype=torch.uint8).t()
    scale = torch.ones(2, 8, dtype=torch.float16).t()
    linear = QuantizedLinear(Grid(4, 16), codes, scale, scale.to(torch.uint8))
    assert all(part.is_contiguous() for part in (linear.codes, linear.scale, linear.zero_point))
    assert torch.equal(linear.codes, codes)


def test_block_result_stores_contiguous_tensors() -> None:
    assert BlockResult({}, {"x": torch.randn(4, 3).t()}).tensors["x"].is_contiguous()


@pytest.mark.parametrize(("found", "strict", "accepted"), [("a", True, True), ("b", False, False), ("", False, True)])
def test_owner_accepts_its_own_files_and_old_ones(found: str, strict: bool, accepted: bool) -> None:
    assert Owner("a", strict).accepts(found) == accepted
    assert not Owner("a", strict=True).accepts("")


def test_state_of_another_place_is_refused(tmp_path: Path) -> None:
    save_state(tmp_path / "state", {"x": 1}, Owner("run/current/000.0.block", strict=True))
    assert load_state(tmp_path / "state", owner=Owner("run/current/000.0.block", strict=True)) == {"x": 1}
    for name in ("run/current/001.0.block", "other/current/000.0.block"):
        with pytest.raises(CorruptFile, match="state: the checksum does not match its content, its run"):
            load_state(tmp_path / "state", owner=Owner(name, strict=True))


def test_run_dir_refuses_blocks_of_another_index_or_run(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    for name, seed in (("a", 1), ("b", 2)):
        with RunDir(tmp_path / name) as run:
            run.claim({"seed": seed}, "")
            for index in range(2):
                run.save_block(index, result(seed + index))
    shutil.copy(tmp_path / "a/blocks/000.safetensors", tmp_path / "a/blocks/001.safetensors")
    shutil.copy(tmp_path / "b/blocks/000.safetensors", tmp_path / "a/blocks/000.safetensors")
    with RunDir(tmp_path / "a") as run:
        with pytest.raises(CorruptFile, match="000.safetensors: the file belongs to another run or to another path"):
            run.read_block(0)
        assert run.load_block(0) is run.load_block(1) is None
    assert "001.safetensors: the file belongs to another run" in caplog.text
    assert not list((tmp_path / "a/blocks").glob("*.safetensors"))


def test_run_dir_refuses_streams_of_another_run(tmp_path: Path) -> None:
    for name, seed in (("a", 1), ("b", 2)):
        with RunDir(tmp_path / name) as run:
            run.claim({"seed": seed}, "")
            run.save_streams(1, torch.ones(1, 2, 3), torch.ones(1, 2, 3))
    shutil.copy(tmp_path / "b/streams.safetensors", tmp_path / "a/streams.safetensors")
    with RunDir(tmp_path / "a") as run:
        assert run.load_streams(torch.clone) is None


def test_run_of_an_earlier_version_reads_files_without_owner(tmp_path: Path) -> None:
    with RunDir(tmp_path / "run") as run:
        run.claim({"seed": 1}, "")
    (tmp_path / "run/fingerprint.json").write_text('{"seed": 1}')
    result().save(tmp_path / "run/blocks/000.safetensors")
    with RunDir(tmp_path / "run") as run:
        assert run.claim({"seed": 1}, "")
        assert run.load_block(0) is not None
    assert identity(tmp_path / "run")[1] is False


def test_fingerprint_read_back_has_the_settings_only(tmp_path: Path) -> None:
    with RunDir(tmp_path / "run") as run:
        run.claim({"seed": 1}, "")
    assert read_fingerprint(tmp_path / "run") == {"seed": 1}
    assert identity(tmp_path / "run")[1] is True


def test_swapped_blocks_are_calibrated_again(tmp_path: Path) -> None:
    command = write_run(tmp_path, model=SMALL)
    assert main(command) == 0
    run = tmp_path / "run"
    before = outcome(run)
    a, b, c = (run / "blocks" / name for name in ("000.safetensors", "001.safetensors", "x"))
    a.rename(c)
    b.rename(a)
    c.rename(b)
    assert main(command) == 0
    assert outcome(run) == before


@pytest.mark.parametrize("code", ["ENOSYS", "ENOLCK", "EOPNOTSUPP"])
def test_lock_missing_on_the_filesystem_is_a_warning(
    code: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def flock(handle: int, operation: int) -> None:
        raise OSError(getattr(errno, code), "nothing like that here")

    monkeypatch.setattr(fcntl, "flock", flock)
    os.close(lock(tmp_path / "lock"))
    assert "this filesystem has no file locks (nothing like that here)" in caplog.text


def test_lock_held_by_another_process_is_refused(tmp_path: Path) -> None:
    handle = lock(tmp_path / "lock")
    with pytest.raises(UserError, match="is in use by another omniq process"):
        lock(tmp_path / "lock")
    os.close(handle)


def test_lock_refused_for_another_reason_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def flock(handle: int, operation: int) -> None:
        raise OSError(errno.EIO, "input/output error")

    monkeypatch.setattr(fcntl, "flock", flock)
    with pytest.raises(UserError, match="cannot be locked: input/output error; choose another folder"):
        lock(tmp_path / "lock")


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("blocks/001.safetensors", "a folder"),
        ("blocks/000.0.csv", "a dangling link"),
        ("current/000.0.last.ckpt", "a folder"),
        ("streams.safetensors", "a dangling link"),
        ("config.yaml", "a folder"),
        ("lock", "a folder"),
        ("perplexity.json", "a link"),
    ],
)
def test_folder_or_link_in_the_place_of_a_file_is_refused(
    name: str, kind: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = write_run(tmp_path, model=SMALL, **QUICK)
    assert main(command) == 0
    entry = tmp_path / "run" / name
    entry.unlink(missing_ok=True)
    (tmp_path / "mine").write_text("mine")
    if kind == "a folder":
        entry.mkdir()
    else:
        entry.symlink_to(tmp_path / ("mine" if kind == "a link" else "nowhere"))
    capsys.readouterr()
    assert main(command) == 2
    said = capsys.readouterr().err
    assert f"{entry} is {kind.replace('dangling ', '')}, but the run keeps a file there: move it away" in said
    assert (tmp_path / "mine").read_text() == "mine"


@pytest.mark.parametrize("name", ["blocks", "current", "tensorboard"])
def test_link_in_the_place_of_a_folder_is_refused(name: str, tmp_path: Path) -> None:
    with RunDir(tmp_path / "run") as run:
        run.claim({"seed": 1}, "")
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine/photo.jpg").write_text("mine")
    entry = tmp_path / "run" / name
    if entry.exists():
        entry.rmdir()
    entry.symlink_to(tmp_path / "mine")
    with pytest.raises(UserError, match=f"{name} is a link, but the run keeps a folder there: move it away"):
        check_entries(tmp_path / "run")
    with pytest.raises(UserError, match="is a link"), RunDir(tmp_path / "run"):
        pass
    assert (tmp_path / "mine/photo.jpg").exists()
