# SPDX-License-Identifier: Apache-2.0
"""An export removes and replaces only what omniq wrote: anything of the user's is refused by name and stays."""

from pathlib import Path

import pytest

from omniq.errors import UserError
from omniq.export import check_free, check_output, export_checkpoint, mend_companions
from omniq.export.manifest import MANIFEST, REPLACED, recorded_names
from omniq.grid.affine import Grid
from omniq.models.source import SourceModel
from omniq.storage.block_result import BlockResult
from tests.helpers.exported import CARD, export, rounded
from tests.helpers.schemes import scheme_of

SCHEME = scheme_of(Grid(4, 32))


def tree(folder: Path) -> dict[str, bytes | None]:
    return {
        path.relative_to(folder).as_posix(): path.read_bytes() if path.is_file() else None for path in folder.rglob("*")
    }


def refused(source: SourceModel, out: Path, message: str) -> None:
    """Every way to export there is refused, and the folder around it stays as it is."""
    before = tree(out.parent)

    def fetch(_: int) -> BlockResult:
        pytest.fail("a block was read before the place was checked")

    for attempt in (
        lambda: check_free(out),
        lambda: check_output(out),
        lambda: export_checkpoint(source, fetch, out, scheme=SCHEME, card=CARD),
    ):
        with pytest.raises(UserError, match=message) as error:
            attempt()
        assert "\n" not in str(error.value)
    assert tree(out.parent) == before


@pytest.mark.parametrize("suffix", ["partial", "previous"])
@pytest.mark.parametrize("name", ["photo.jpg", "config.json", "sub/model.safetensors", "empty/"])
@pytest.mark.parametrize("there", [False, True])
def test_export_leaves_a_folder_of_the_user_beside_it(
    there: bool, name: str, suffix: str, source: SourceModel, results: list[BlockResult], tmp_path: Path
) -> None:
    out = tmp_path / "place/mine"
    if there:
        export(source, results, out)
    mine = out.with_name(f".mine.{suffix}") / name
    if name.endswith("/"):
        mine.mkdir(parents=True)
    else:
        mine.parent.mkdir(parents=True)
        mine.write_text("mine")
    refused(source, out, rf"mine: .*/\.mine\.{suffix} stands where omniq keeps an unfinished export, and .*: ?|move it")


def test_export_leaves_a_copy_of_an_export_that_the_user_made(
    source: SourceModel, results: list[BlockResult], tmp_path: Path
) -> None:
    out = export(source, results, tmp_path / "place/mine")
    out.rename(out.with_name(".mine.previous"))
    refused(source, out, r"\.mine\.previous stands where .*, and omniq did not make it; move it away or choose another")


def test_export_leaves_links_and_files_of_the_user_beside_it(source: SourceModel, tmp_path: Path) -> None:
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos/a.jpg").write_text("mine")
    (tmp_path / "place").mkdir()
    partial = tmp_path / "place/.mine.partial"
    for make in (
        lambda: partial.symlink_to(tmp_path / "photos"),
        lambda: partial.symlink_to(tmp_path / "gone"),
        lambda: partial.write_text("mine"),
    ):
        make()
        refused(source, tmp_path / "place/mine", r"\.mine\.partial stands where .*, and omniq did not make it")
        partial.unlink()
    assert (tmp_path / "photos/a.jpg").read_text() == "mine"


@pytest.mark.parametrize("mark", [MANIFEST, REPLACED])
def test_export_leaves_files_of_the_user_in_an_unfinished_export(
    mark: str, source: SourceModel, results: list[BlockResult], tmp_path: Path
) -> None:
    out = export(source, results, tmp_path / "place/mine")
    leftover = out.with_name(".mine.partial" if mark == MANIFEST else ".mine.previous")
    out.rename(leftover)
    (leftover / REPLACED).touch()
    (leftover / "photo.jpg").write_text("mine")
    refused(source, out, r" and it holds photo\.jpg, which omniq did not write; move it away")


@pytest.mark.parametrize("recorded", [True, False])
@pytest.mark.parametrize("name", ["notes.txt", "sub/model.safetensors", "empty/", ".hidden", "model-1.safetensors"])
def test_export_with_files_of_the_user_inside_is_not_replaced(
    name: str, recorded: bool, source: SourceModel, results: list[BlockResult], tmp_path: Path
) -> None:
    out = export(source, results, tmp_path / "place/mine")
    if not recorded:  # as version 0.1 wrote it
        (out / MANIFEST).unlink()
    (out / name).parent.mkdir(exist_ok=True)
    (out / name).mkdir() if name.endswith("/") else (out / name).write_text("mine")
    (out / "model.safetensors").write_bytes(b"damaged")
    before = tree(out)
    first = name.rstrip("/")
    with pytest.raises(UserError, match=rf"it holds {first}, which omniq did not write; move that away or choose"):
        export(source, rounded(source, Grid(2, 32)), out)
    assert tree(out) == before
    (out / name).rmdir() if name.endswith("/") else (out / name).unlink()
    if name.startswith("sub"):
        (out / "sub").rmdir()
    export(source, results, out)
    assert (out / MANIFEST).is_file()


def test_export_names_of_a_tokenizer_are_the_users_unless_recorded(
    source: SourceModel, results: list[BlockResult], tmp_path: Path
) -> None:
    out = export(source, results, tmp_path / "place/mine")
    assert recorded_names(out) == set(tree(out)) - {MANIFEST}
    (out / "vocab.txt").write_text("mine")
    with pytest.raises(UserError, match=r"it holds vocab\.txt, which omniq did not write"):
        export(source, results, out)


def test_file_that_appears_during_an_export_is_not_removed(
    source: SourceModel, results: list[BlockResult], tmp_path: Path
) -> None:
    out = export(source, results, tmp_path / "place/mine")

    def fetch(index: int) -> BlockResult:
        (out / "notes.txt").write_text("mine")
        return results[index]

    with pytest.raises(UserError, match=r"it holds notes\.txt, which omniq did not write"):
        export_checkpoint(source, fetch, out, scheme=SCHEME, card=CARD)
    assert (out / "notes.txt").read_text() == "mine"
    assert [path.name for path in out.parent.iterdir()] == ["mine"]


def test_mended_export_keeps_files_of_the_user_and_does_not_claim_them(
    source: SourceModel, results: list[BlockResult], tmp_path: Path
) -> None:
    out = export(source, results, tmp_path / "place/mine")
    (out / "notes.txt").write_text("mine")
    (out / "generation_config.json").unlink()
    (out / MANIFEST).unlink()
    mended = mend_companions(source, out, scheme=SCHEME, card=CARD, format="compressed-tensors")
    assert "generation_config.json" in mended
    assert (out / "notes.txt").read_text() == "mine"
    assert recorded_names(out) == set(tree(out)) - {MANIFEST, "notes.txt"}


@pytest.mark.parametrize(
    "inside", ["", "current", "blocks", "blocks/new", "tensorboard/x", "summary.json", "model/new"]
)
def test_places_of_a_run_are_refused(inside: str, source: SourceModel, tmp_path: Path) -> None:
    run = tmp_path / "run"
    for name in ("current", "blocks"):
        (run / name).mkdir(parents=True)
    (run / "fingerprint.json").write_text("{}")
    (tmp_path / "link").symlink_to(run)
    for out in (run / inside, tmp_path / "link" / inside):
        with pytest.raises(UserError, match=r"export to .*run.*: it belongs to the run in .*/run; choose a folder of"):
            check_output(out)
    check_output(run / "exports/new")
    check_output(run / "model")


def test_places_that_cannot_be_are_refused_in_one_line(tmp_path: Path) -> None:
    (tmp_path / "ring").symlink_to(tmp_path / "ring")
    for out, reason in {
        "/": "it is the root of the file system",
        "a" * 300: "too long",
        "b" * 250: "too long",  # only with the ending that an unfinished export has
        "/".join(["c" * 200] * 30): "too long",
        "ring/x": "loop|[Tt]oo many levels",
        "d\0": "embedded null",
        "/dev/full": "it is not an omniq export",
        "/dev/null/x": "/dev/null is not a folder",
    }.items():
        for check in (check_free, check_output):
            with pytest.raises(UserError, match=reason) as error:
                check(tmp_path / out)
            assert "\n" not in str(error.value)
