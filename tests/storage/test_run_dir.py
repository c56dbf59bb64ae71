# SPDX-License-Identifier: Apache-2.0
"""The run directory: its records, its blocks, and files that belong to another run."""

import json
import math
import shutil
from pathlib import Path

import pytest
import torch
from torch import Tensor

from omniq.cli import main
from omniq.errors import CorruptFile, UserError
from omniq.grid.affine import Grid
from omniq.storage.block_result import BlockResult, QuantizedLinear
from omniq.storage.claim import identity, read_fingerprint
from omniq.storage.ownership import check_entries
from omniq.storage.run_dir import RunDir
from tests.helpers.runs import QUICK, SMALL, outcome, write_run


def equal(left: Tensor, right: Tensor) -> bool:
    return left.dtype == right.dtype and left.shape == right.shape and torch.equal(left, right)


def test_write_json_nonfinite_numbers_become_null(tmp_path: Path) -> None:
    with RunDir(tmp_path) as run:
        run.write_json("summary.json", {"perplexity": {"rtn": math.inf}, "blocks": [{"loss": math.nan}, {"loss": 0.5}]})

    def refuse(name: str) -> None:
        raise AssertionError(f"{name} is no JSON")

    found = json.loads((tmp_path / "summary.json").read_text(), parse_constant=refuse)
    assert found == {"perplexity": {"rtn": None}, "blocks": [{"loss": None}, {"loss": 0.5}]}


def test_finished_ignores_copies_beside_blocks(tmp_path: Path) -> None:
    for name in ("000.safetensors", "1000.safetensors", "000 (copy).safetensors"):
        (tmp_path / "blocks").mkdir(exist_ok=True)
        (tmp_path / "blocks" / name).touch()
    assert RunDir(tmp_path).finished() == [0, 1000]


def test_run_dir_keeps_streams_and_records(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with RunDir(tmp_path / "run") as folder:
        streams = (torch.randn(2, 4, 8).bfloat16(), torch.randn(2, 4, 8).bfloat16())
        assert folder.load_streams(torch.clone) is None
        folder.save_streams(3, *streams)
        found = folder.load_streams(torch.clone)
        assert found is not None
        assert found[0] == 3
        assert equal(found[1], streams[0])
        assert equal(found[2], streams[1])
        folder.save_record("x.json", {"a": 0.1, "b": None})
        assert folder.load_record("x.json") == {"a": 0.1, "b": None}
        for damage in ('{"a": 0.2, "b": null', '{"a": 0.2, "b": null}', "[]", "1"):
            (tmp_path / "run/x.json").write_text(damage)
            assert folder.load_record("x.json") is None
            assert not (tmp_path / "run/x.json").exists()
            assert "x.json: the checksum does not match its content; removed" in caplog.messages[-1]


def result(seed: int = 0) -> BlockResult:
    weight = torch.randn(8, 32, generator=torch.Generator().manual_seed(seed))
    grid = Grid(4)
    scale, zero = grid.fit(*grid.range(weight))
    linear = QuantizedLinear.of(grid, grid.quantize(weight, scale, zero), scale, zero)
    return BlockResult({"q": linear}, {"norm.weight": torch.ones(4)})


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


def test_run_dir_of_earlier_version_reads_files_without_owner(tmp_path: Path) -> None:
    with RunDir(tmp_path / "run") as run:
        run.claim({"seed": 1}, "")
    (tmp_path / "run/fingerprint.json").write_text('{"seed": 1}')
    result().save(tmp_path / "run/blocks/000.safetensors")
    with RunDir(tmp_path / "run") as run:
        assert run.claim({"seed": 1}, "")
        assert run.load_block(0) is not None
    assert identity(tmp_path / "run")[1] is False


def test_read_fingerprint_has_settings_only(tmp_path: Path) -> None:
    with RunDir(tmp_path / "run") as run:
        run.claim({"seed": 1}, "")
    assert read_fingerprint(tmp_path / "run") == {"seed": 1}
    assert identity(tmp_path / "run")[1] is True


def test_run_with_swapped_blocks_calibrates_again(tmp_path: Path) -> None:
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
def test_run_with_folder_or_link_for_file_is_refused(
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
def test_run_dir_with_link_for_folder_is_refused(name: str, tmp_path: Path) -> None:
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
