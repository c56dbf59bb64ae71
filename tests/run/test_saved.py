# SPDX-License-Identifier: Apache-2.0
"""A finished run that is started again, with records that are missing, damaged or of other settings."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file

import omniq
from omniq.cli.command import main
from omniq.run import saved
from tests.helpers.runs import SMALL, write_run

RTN = [{"class_path": "omniq.stages.RTN"}]


class Finished(NamedTuple):
    """A run of its own for each test, and the command that made it."""

    run: Path
    args: list[str]
    said: Callable[[], str]

    def text(self) -> dict[str, bytes]:
        """The checkpoint's files."""
        return {path.name: path.read_bytes() for path in (self.run / "model").iterdir()}


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[str]]:
    folder = tmp_path_factory.mktemp("reopen")
    args = write_run(folder, model=SMALL, stages=RTN, out=str(folder / "run"))
    assert main(args) == 0
    return folder, args


@pytest.fixture
def finished(original: tuple[Path, list[str]], capfd: pytest.CaptureFixture[str]) -> Finished:
    """Its folder has the same name each time: the configuration records it."""
    folder, args = original
    kept, run = folder / "kept", folder / "run"
    if not kept.exists():
        shutil.copytree(run, kept)
    shutil.rmtree(run)
    shutil.copytree(kept, run)

    def said() -> str:
        found = capfd.readouterr()
        return " ".join((found.out + found.err).split())

    said()
    return Finished(run, args, said)


def test_run_without_fingerprint_is_not_continued(finished: Finished) -> None:
    """The settings of the existing blocks are unknown."""
    (finished.run / "fingerprint.json").unlink()
    before = (finished.run / "config.yaml").read_bytes()
    assert main([*finished.args, "--data.samples", "2"]) == 2
    assert "run holds companions.json and no fingerprint.json, so it is not a run directory" in finished.said()
    assert (finished.run / "config.yaml").read_bytes() == before


@pytest.mark.parametrize("content", ["[]", "1", "null", '{"seed": 2', "\xff"])
def test_run_with_meaningless_fingerprint_is_refused(finished: Finished, content: str) -> None:
    (finished.run / "fingerprint.json").write_text(content, encoding="latin-1")
    assert main(finished.args) == 2
    said = finished.said()
    assert f"{finished.run / 'fingerprint.json'} is damaged (" in said
    assert f"remove {finished.run} to start over" in said


@pytest.mark.parametrize("damage", ["truncated", "missing"])
def test_run_start_writes_configuration_again(finished: Finished, damage: str) -> None:
    path = finished.run / "config.yaml"
    whole, before = path.read_bytes(), finished.text()
    path.unlink() if damage == "missing" else path.write_bytes(whole[: len(whole) // 2])
    assert main(finished.args) == 0
    assert path.read_bytes() == whole
    assert finished.text() == before


def test_run_recorded_recipe_has_last_settings(finished: Finished, tmp_path: Path) -> None:
    """This includes settings that may change; the record repeats the run, and ``omniq export`` works."""
    moved = shutil.copytree(finished.run.parent / "source", tmp_path / "moved")
    assert main([*finished.args, "--model.path", str(moved), "--evaluation.max_windows", "2"]) == 0
    assert "README.md, recipe.yaml" in finished.said()
    for name in ("config.yaml", "model/recipe.yaml"):
        recorded = yaml.safe_load((finished.run / name).read_text())
        assert recorded["model"]["path"] == str(moved)
        assert recorded["evaluation"]["max_windows"] == 2
    assert "| the first 2 " in (finished.run / "model/README.md").read_text()
    assert main(["export", "--run", str(finished.run), "--out", str(tmp_path / "out")]) == 0


@pytest.mark.parametrize("verify", ["true", "false"])
@pytest.mark.parametrize("damage", ["truncated", "missing"])
def test_run_damaged_file_beside_weights_is_written_again(finished: Finished, damage: str, verify: str) -> None:
    """The run compares all files that a user needs to open the checkpoint, not only the weights."""
    names = ["README.md", "generation_config.json", "tokenizer.json", "tokenizer_config.json"]
    before = finished.text()
    for name in names:
        path = finished.run / "model" / name
        path.write_bytes(before[name][: len(before[name]) // 2]) if damage == "truncated" else path.unlink()
    (finished.run / "model/mine").write_text("kept")
    prompt = ["--export.prompt", "a", "--export.verify", verify]
    assert main([*finished.args, *prompt]) == 0
    said = finished.said()
    assert "the checkpoint says: 'a" in said
    assert "recipe.yaml" in said  # the settings above are in it
    for name in names:
        assert name in said
    assert main(finished.args) == 0
    assert finished.text() == before | {"mine": b"kept"}
    assert "rewritten in" in finished.said()  # the recipe, once more
    assert main(finished.args) == 0
    assert "rewritten in" not in finished.said()


@pytest.mark.parametrize("content", ["{", "[]", "\xff"])
def test_export_of_run_with_damaged_summary_is_refused(finished: Finished, content: str, tmp_path: Path) -> None:
    (finished.run / "summary.json").write_text(content, encoding="latin-1")
    assert main(["export", "--run", str(finished.run), "--out", str(tmp_path / "out")]) == 2
    assert f"{finished.run / 'summary.json'} is damaged: run its quantize command again" in finished.said()
    assert main(finished.args) == 0
    assert json.loads((finished.run / "summary.json").read_text())["scheme"] == "W3A16g16"


def test_export_of_run_with_changed_model_is_refused(finished: Finished, tmp_path: Path) -> None:
    """Otherwise all tensors outside the blocks would silently come from another model."""
    weights = finished.run.parent / "source/model.safetensors"
    original = weights.read_bytes()
    tensors = load_file(weights)
    tensors["model.norm.weight"] = torch.full_like(tensors["model.norm.weight"], 2)
    save_file(tensors, weights, metadata={"format": "pt"})
    try:
        assert main(["export", "--run", str(finished.run), "--out", str(tmp_path / "out")]) == 2
    finally:
        weights.write_bytes(original)
    assert f"source' is not the model that {finished.run} was made from: restore it" in finished.said()
    assert not (tmp_path / "out").exists()


def test_export_from_another_folder_takes_the_place_of_the_model(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """The run names its model by a relative path; what lies at the new place must be the same model."""
    args = write_run(tmp_path, model=SMALL, stages=RTN, evaluation=None, export={"format": "none"})
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path)
    assert main([*args, "--model.path", "./source"]) == 0
    monkeypatch.chdir(tmp_path / "elsewhere")
    capfd.readouterr()
    export = ["export", "--run", str(tmp_path / "run"), "--out", str(tmp_path / "out")]
    assert main(export) == 2
    said = capfd.readouterr().err
    assert "model.path './source' does not exist" in said
    assert "name its place by --model.path" in said
    shutil.copytree(tmp_path / "source", tmp_path / "other")
    tensors = load_file(tmp_path / "source/model.safetensors")
    tensors["model.norm.weight"] = torch.full_like(tensors["model.norm.weight"], 2)
    save_file(tensors, tmp_path / "other/model.safetensors", metadata={"format": "pt"})
    assert main([*export, "--model.path", "../other"]) == 2
    assert "model.path '../other' is not the model that" in capfd.readouterr().err
    assert not (tmp_path / "out").exists()
    assert main([*export, "--model.path", "../source"]) == 0
    assert "read back equal" in capfd.readouterr().out


def test_report_and_export_of_hostile_run_import_no_class_it_names(
    finished: Finished, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Neither trainer, callbacks and texts, which nobody needs, nor a stage of a foreign package."""
    mark = tmp_path / "mark"
    (tmp_path / "hostile_package.py").write_text(f"open({str(mark)!r}, 'w').close()\nclass Evil:\n    pass\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    path = finished.run / "config.yaml"
    content = yaml.safe_load(path.read_text())
    command = {"class_path": "os.system", "init_args": {"command": f"touch {mark}"}}
    evil = {"class_path": "hostile_package.Evil"}
    changes: list[dict[str, object]] = [
        {"trainer": command},
        {"trainer": content["trainer"] | {"class_path": "hostile_package.Evil"}},
        {"callbacks": [evil]},
        {"data": content["data"] | {"source": evil}},
        {"stages": [evil]},
        {"model": evil},
        {"scheme": evil},
    ]
    for change in changes:
        path.write_text(yaml.safe_dump(content | change))
        assert main(["report", "--run", str(finished.run)]) == 0
        main(["export", "--run", str(finished.run), "--out", str(tmp_path / "out")])
        assert "Traceback" not in finished.said()
        assert not mark.exists(), change


def test_export_of_run_with_changed_configuration_is_refused(finished: Finished, tmp_path: Path) -> None:
    path = finished.run / "config.yaml"
    path.write_text(path.read_text().replace("W3A16g16", "W3A8g16"))
    export = ["export", "--run", str(finished.run), "--out", str(tmp_path / "out")]
    assert main(export) == 2
    assert (
        f"{path} is not the configuration of the run (scheme.name differ): run its quantize command again"
        in finished.said()
    )
    path.write_text("stages: [")
    assert main(export) == 2
    assert f"{path} cannot be read (" in finished.said()
    assert main(finished.args) == 0
    assert main(export) == 0


def test_export_of_outliers_in_format_without_place_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """The check precedes the opening of the model, which is then read completely."""
    stages = [{"class_path": "omniq.stages.QuantEase", "init_args": {"outliers": 1.0, "sweeps": 2}}]
    args = write_run(tmp_path, model=SMALL, stages=stages, export={"format": "omniq"}, evaluation=None)
    assert main(args) == 0
    capfd.readouterr()
    monkeypatch.setattr(saved, "open_model", lambda run: pytest.fail("the model was opened"))
    export = ["export", "--run", str(tmp_path / "run"), "--out", str(tmp_path / "out")]
    assert main(export) == 2
    assert "export.format compressed-tensors does not support the sparse outliers" in capfd.readouterr().err


def test_run_paths_with_tilde_are_in_home_folder(
    original: tuple[Path, list[str]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A shell does not always expand it, and removing a folder named ``~`` is dangerous."""
    _, args = original
    (tmp_path / "home").mkdir()
    (tmp_path / "here").mkdir()
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.chdir(tmp_path / "here")
    assert main([*args, "--out=~/run"]) == 0
    assert main(["export", "--run=~/run", "--out=~/again"]) == 0
    assert main(["report", "--run=~/run"]) == 0
    text = yaml.safe_dump({"evaluation": yaml.safe_load(Path(args[2]).read_text())["evaluation"]})
    Path("text.yaml").write_text(text)
    assert main(["evaluate", "--model.path=~/again", "--config", "text.yaml", "--out=~/measured.json"]) == 0
    assert omniq.load("~/run").config.model_type == omniq.load("~/again").config.model_type == "llama"
    assert {path.name for path in (tmp_path / "home").iterdir()} == {"run", "again", "measured.json"}
    assert [path.name for path in (tmp_path / "here").iterdir()] == ["text.yaml"]


def test_run_with_taken_export_folder_is_refused_at_once(finished: Finished) -> None:
    shutil.rmtree(finished.run / "model")
    (finished.run / "blocks/001.safetensors").unlink()
    (finished.run / "model").mkdir()
    (finished.run / "model/mine").write_text("mine")
    assert main(finished.args) == 2
    assert f"cannot export to {finished.run / 'model'}: it is not an omniq export" in finished.said()
    assert not (finished.run / "blocks/001.safetensors").exists()
