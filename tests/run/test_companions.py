# SPDX-License-Identifier: Apache-2.0
"""A run whose source model has other tokenizer files or another generation config than at its start."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import pytest

from omniq.cli.command import main
from tests.helpers.runs import SMALL, outcome, write_run

CHANGED = "chat_template.jinja (added), generation_config.json (changed), tokenizer_config.json (removed)"


class Finished(NamedTuple):
    """A run that has ended, the command that made it, its source model, and what was printed since the last call."""

    run: Path
    args: list[str]
    source: Path
    said: Callable[[], str]


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[str]]:
    folder = tmp_path_factory.mktemp("companions")
    args = write_run(folder, model=SMALL, stages=[{"class_path": "RTN"}], evaluation=None)
    assert main([*args, "--out", str(folder / "run")]) == 0
    return folder, args


@pytest.fixture
def finished(
    original: tuple[Path, list[str]],
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
    capfd: pytest.CaptureFixture[str],
) -> Finished:
    folder, args = original
    run, source = (Path(shutil.copytree(folder / name, tmp_path / name)) for name in ("run", "source"))

    def said() -> str:
        found, logged = capfd.readouterr(), caplog.messages
        caplog.clear()
        return " ".join(" ".join([found.out, found.err, *logged]).split())

    args = [*args, "--model.path", str(source), "--out", str(run)]
    assert main(args) == 0  # the recipe names the place of the copy
    assert "differ from those at the start" not in said()
    return Finished(run, args, source, said)


def change(source: Path) -> None:
    """Change one companion file, remove another one and add a third; the tokens stay the same."""
    (source / "generation_config.json").write_text('{"max_new_tokens": 7}')
    (source / "tokenizer_config.json").unlink()
    (source / "chat_template.jinja").write_text("{{ messages }}")


def test_run_continued_with_changed_companions_names_them_and_keeps_the_codes(finished: Finished) -> None:
    before = outcome(finished.run)
    kept = shutil.copytree(finished.source, finished.source.parent / "kept")
    change(finished.source)
    for _ in range(2):  # every start says so, not only the first one after the change
        assert main(finished.args) == 0
        assert f"{finished.source}: files of the model differ from those at the start of the run: {CHANGED}; the " in (
            finished.said()
        )
    changed = outcome(finished.run)
    different = {name for name in before.keys() | changed.keys() if before.get(name) != changed.get(name)}
    assert "model/generation_config.json" in different
    assert not {name for name in different if not name.startswith("model/")}
    assert not different & {"model/model.safetensors", "model/config.json"}
    shutil.rmtree(finished.source)
    shutil.copytree(kept, finished.source)
    assert main(finished.args) == 0
    assert "differ from those" not in finished.said()
    restored = outcome(finished.run)
    assert {name: restored[name] for name in before if name != "model/.omniq-export.json"} == {
        name: before[name] for name in before if name != "model/.omniq-export.json"
    }


def test_export_with_changed_companions_names_them(finished: Finished, tmp_path: Path) -> None:
    export = ["export", "--run", str(finished.run), "--export.format", "omniq", "--out"]
    assert main([*export, str(tmp_path / "before")]) == 0
    assert "differ from those" not in finished.said()
    change(finished.source)
    assert main([*export, str(tmp_path / "after")]) == 0
    assert f"at the start of the run: {CHANGED}; the checkpoint gets the present ones" in finished.said()


def test_run_whose_changed_tokenizer_alters_the_tokens_is_refused(finished: Finished) -> None:
    file = finished.source / "tokenizer.json"
    tokenizer = json.loads(file.read_text())
    tokenizer["normalizer"] = {"type": "Lowercase"}
    tokenizer["pre_tokenizer"] = {"type": "Whitespace"}
    file.write_text(json.dumps(tokenizer))
    assert main(finished.args) == 2
    assert "data digest (was " in finished.said()


@pytest.mark.parametrize("state", ["missing", "damaged", "of another record"])
def test_run_without_record_of_companions_continues_and_gets_one(finished: Finished, state: str) -> None:
    """Runs of earlier versions have no record."""
    record = finished.run / "companions.json"
    whole = record.read_bytes()
    if state == "missing":
        record.unlink()
    else:
        record.write_bytes(whole[:-9] if state == "damaged" else (finished.run / "export.json").read_bytes())
    assert main(finished.args) == 0
    said = finished.said()
    assert "differ from those" not in said
    assert (f"{record}: the checksum does not match its content; removed, it is written again" in said) == (
        state == "damaged"
    )
    assert record.read_bytes() == whole
