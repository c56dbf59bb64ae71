# SPDX-License-Identifier: Apache-2.0
"""An export that is killed, fails or finds no room leaves the old checkpoint or the new one, never a mixture."""

import errno
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import transformers

from omniq.errors import UserError
from omniq.export import check_output, export_checkpoint, mend_companions
from omniq.export.containers import shards
from omniq.export.manifest import MANIFEST
from omniq.grid.affine import Grid
from omniq.models.source import SourceModel
from omniq.storage.block_result import BlockResult
from tests.helpers.exported import CARD, export, rounded
from tests.helpers.schemes import scheme_of

GIVEN = {"card": CARD, "scheme": scheme_of(Grid(4, 32))}


class Killed(BaseException):
    """Like SIGKILL: it is no ``Exception``, so no handler catches it."""


def killed_at(results: list[BlockResult], index: int) -> Callable[[int], BlockResult]:
    def fetch(wanted: int) -> BlockResult:
        if wanted == index:
            raise Killed
        return results[wanted]

    return fetch


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_export_killed_leaves_nothing_or_earlier_export(
    source: SourceModel, results: list[BlockResult], tmp_path: Path
) -> None:
    place = tmp_path / "place"
    out = place / "out"
    with pytest.raises(Killed):
        export_checkpoint(source, killed_at(results, 1), out, max_shard_bytes=10_000, **GIVEN)
    assert not list(place.iterdir())
    export(source, results, out)
    before = contents(out)
    with pytest.raises(Killed):
        export_checkpoint(source, killed_at(results, 1), out, max_shard_bytes=10_000, **GIVEN)
    assert contents(out) == before
    assert [path.name for path in place.iterdir()] == ["out"]
    export(source, rounded(source, Grid(2, 32)), out)
    assert "W2A16g32" in (out / "README.md").read_text()
    assert [path.name for path in place.iterdir()] == ["out"]


def copying_before(change: Callable[..., Any], place: Path, kept: Path) -> Callable[..., Any]:
    """A change of the disk that first copies ``place`` into a new folder in ``kept``."""

    def changed(*args: Any, **kwargs: Any) -> Any:
        if not any(str(argument).startswith(str(kept)) for argument in args) and place.exists():
            shutil.copytree(place, kept / f"{len(list(kept.iterdir())):03d}/place", symlinks=True)
        return change(*args, **kwargs)

    return changed


def test_export_killed_at_any_change_of_the_disk_is_put_right(
    source: SourceModel, results: list[BlockResult], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The folder is copied before each change of a name, which is what a kill there would leave."""
    place, kept = tmp_path / "place", tmp_path / "kept"
    tokenizer = source.tokenizer()
    tokenizer.chat_template = {"default": "{{ messages }}", "tool_use": "{{ tools }}"}  # makes a folder
    monkeypatch.setattr(source, "tokenizer", lambda: tokenizer)
    before = contents(export(source, results, place / "out"))
    after = contents(export(source, rounded(source, Grid(2, 32)), tmp_path / "other/out"))
    assert before.keys() == after.keys()
    kept.mkdir()
    with monkeypatch.context() as patch:
        for name in ("rename", "replace", "unlink", "rmdir", "mkdir"):
            patch.setattr(os, name, copying_before(getattr(os, name), place, kept))
        export(source, rounded(source, Grid(2, 32)), place / "out")
    left = sorted(kept.iterdir())
    assert len(left) > 20
    for folder in left:
        out = folder / "place/out"
        check_output(out)
        assert contents(out) in (before, after), folder
        assert [path.name for path in out.parent.iterdir()] == ["out"], folder
    for folder in left[:: len(left) // 4]:
        assert contents(export(source, results, folder / "place/out")) == before


def test_leftovers_of_version_0_1_are_put_right_in_a_run(
    source: SourceModel, results: list[BlockResult], tmp_path: Path
) -> None:
    """They carry no mark; the run directory says whose they are."""
    run = tmp_path / "run"
    run.mkdir()
    (run / "fingerprint.json").write_text("{}")
    out = export(source, results, run / "model")
    (out / MANIFEST).unlink()
    before = contents(out)
    out.rename(run / ".model.previous")  # killed between the two renames
    shutil.copytree(run / ".model.previous", run / ".model.partial")
    (run / ".model.partial/model.safetensors").rename(run / ".model.partial/shard-00000.safetensors")
    check_output(out)
    assert contents(out) == before
    assert sorted(path.name for path in run.iterdir()) == ["fingerprint.json", "model"]
    export(source, rounded(source, Grid(2, 32)), out)
    assert (out / MANIFEST).is_file()


def full_disk(*_: Any, **__: Any) -> None:
    raise OSError(errno.ENOSPC, "No space left on device")


@pytest.mark.parametrize("where", ["weights", "config", "tokenizer"])
def test_export_on_full_disk_is_refused_and_leaves_nothing(
    where: str, source: SourceModel, results: list[BlockResult], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def rust(*_: Any, **__: Any) -> None:
        raise Exception("No space left on device (os error 28)")  # what tokenizers raises

    if where == "weights":
        monkeypatch.setattr(shards, "save_file", full_disk)
    elif where == "config":
        monkeypatch.setattr(transformers.LlamaConfig, "to_json_file", full_disk)
    else:
        monkeypatch.setattr(transformers.PreTrainedTokenizerFast, "save_pretrained", rust)
    place = tmp_path / "place"
    with pytest.raises(
        UserError, match=r"cannot write .*place/\.out\.partial.*: No space left on device.*: free space"
    ):
        export(source, results, place / "out")
    assert not list(place.iterdir())


def test_export_beyond_file_size_limit_is_refused_and_leaves_nothing(
    source: SourceModel, results: list[BlockResult], tmp_path: Path
) -> None:
    resource = pytest.importorskip("resource")
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, limits[1]))
    try:
        with pytest.raises(UserError, match=r"cannot write .*shard-00000\.safetensors: .*too large"):
            export(source, results, tmp_path / "out")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert not (tmp_path / "out").exists()
    assert not (tmp_path / ".out.partial").exists()


def test_export_to_unusable_place_is_refused_before_any_work(source: SourceModel, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("mine")
    with pytest.raises(UserError, match=r"cannot write .*file/out: .*/file is a file: choose another"):
        export_checkpoint(source, killed_at([], 0), tmp_path / "file" / "out", **GIVEN)
    with pytest.raises(UserError, match="it is not an omniq export"):
        export_checkpoint(source, killed_at([], 0), tmp_path / "file", **GIVEN)
    with pytest.raises(UserError, match="it is not an omniq export"):
        export_checkpoint(source, killed_at([], 0), source.folder, **GIVEN)
    assert (tmp_path / "file").read_text() == "mine"


FOREIGN = {  # what others write under the same names
    "llm-compressor": {"recipe.yaml": "default_stage:\n  default_modifiers:\n    GPTQModifier: {scheme: W4A16}\n"},
    "a card": {"recipe.yaml": "a: 1", "README.md": "---\ntags: [quantized]\n---\n# omniq\n"},
    "no card": {"recipe.yaml": "[", "README.md": "tags:\n- omniq\n"},
    "no front matter": {"README.md": "---\n- omniq\n---\n"},
    "a broken one": {"README.md": "---\n[\n---\n"},
    "no date": {"README.md": "---\ndate: 2024-13-45\n---\n", "recipe.yaml": "date: 2024-13-45"},
    "weights": {"model.safetensors": "mine"},
}


@pytest.mark.parametrize("files", FOREIGN.values(), ids=FOREIGN)
def test_export_over_folder_of_another_tool_is_refused(
    files: dict[str, str], source: SourceModel, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    out.mkdir()
    for name, content in {"config.json": "{}", **files}.items():
        (out / name).write_text(content)
    before = contents(out)
    with pytest.raises(UserError, match="it is not an omniq export: choose an empty or new folder"):
        export_checkpoint(source, killed_at([], 0), out, **GIVEN)
    assert contents(out) == before


@pytest.mark.parametrize("damaged", ["README.md", "recipe.yaml"])
@pytest.mark.parametrize("content", [None, b"\xff\x00"])
def test_check_output_recognizes_own_export_by_card_or_recipe(
    damaged: str, content: bytes | None, source: SourceModel, results: list[BlockResult], tmp_path: Path
) -> None:
    recipe = "model: {path: x}\ndata: {}\nstages: []\nscheme: {name: W4A16g32}\n"
    out = export(source, results, tmp_path / "out", card={**CARD, "recipe": recipe})
    (out / damaged).unlink() if content is None else (out / damaged).write_bytes(content)
    check_output(out)
    (out / MANIFEST).unlink()  # as in a folder of version 0.1
    check_output(out)
    (out / "config.json").unlink()
    with pytest.raises(UserError, match="it is not an omniq export"):
        check_output(out)


def test_export_flushes_files_before_rename(
    source: SourceModel, results: list[BlockResult], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """This includes files in folders, such as those of a tokenizer with several chat templates."""
    tokenizer = source.tokenizer()
    tokenizer.chat_template = {"default": "{{ messages }}", "tool_use": "{{ tools }}"}
    monkeypatch.setattr(source, "tokenizer", lambda: tokenizer)
    out, real, flushed = tmp_path / "place/out", os.fsync, set()

    def flush(handle: int) -> None:
        real(handle)
        if not out.exists():
            flushed.add(os.fstat(handle).st_ino)

    monkeypatch.setattr(os, "fsync", flush)
    export(source, results, out)
    template = out / "additional_chat_templates/tool_use.jinja"
    assert template.is_file()
    assert {path.stat().st_ino for path in out.rglob("*")} <= flushed
    shutil.rmtree(template.parent)
    flushed.clear()
    monkeypatch.setattr(os, "fsync", lambda handle: (real(handle), flushed.add(os.fstat(handle).st_ino)))
    assert mend_companions(source, out, format="compressed-tensors", **{**GIVEN, "card": {**CARD, "recipe": "a: 1"}})
    assert {template.stat().st_ino, template.parent.stat().st_ino, out.stat().st_ino} <= flushed


def test_export_beside_folder_of_user_leaves_it(
    source: SourceModel, results: list[BlockResult], tmp_path: Path
) -> None:
    mine = tmp_path / "place/out.partial/mine"
    mine.parent.mkdir(parents=True)
    mine.write_text("mine")
    export(source, results, tmp_path / "place/out")
    assert mine.read_text() == "mine"
