# SPDX-License-Identifier: Apache-2.0
"""The Hugging Face folder as a container: reading it back, recognizing earlier exports, missing packages."""

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from omniq.errors import CorruptFile
from omniq.export import FORMATS, VerificationError, earlier_export, find_format
from omniq.export.containers.huggingface import HuggingFaceFolder
from omniq.export.containers.requirements import missing_packages
from omniq.grid.affine import Grid
from omniq.models.source import SourceModel
from omniq.storage.block_result import BlockResult
from tests.helpers.exported import CARD, WINDOWS, export, verify
from tests.helpers.schemes import scheme_of

SCHEME = scheme_of(Grid(4, 32))


FOLDERS = [name for name, format in FORMATS.items() if type(format.container) is HuggingFaceFolder]


def edit(out: Path, change: Callable[[dict[str, Any]], None]) -> None:
    file = out / "config.json"
    content = json.loads(file.read_text())
    change(content)
    file.write_text(json.dumps(content))


@pytest.mark.parametrize("name", FOLDERS)
def test_container_read_returns_what_write_was_given(
    name: str, source: SourceModel, results: list[BlockResult], tmp_path: Path
) -> None:
    out = export(source, results, tmp_path / "out", format=name, max_shard_bytes=20_000)
    chosen = find_format(name)
    with chosen.container.read(out, chosen.codec(SCHEME)) as reader:
        for index, result in enumerate(results):
            for linear, expected in result.linears.items():
                found = reader.read(f"{source.block_name(index)}.{linear}")
                assert found.grid == expected.grid
                assert torch.equal(found.dequantize(), expected.dequantize())
        assert torch.equal(reader["model.norm.weight"], dict(source.outside())["model.norm.weight"].half())
        assert reader.model.config.model_type == "llama"
        assert reader.size == sum(reader[name].nbytes for name in reader.names)


# -- whose folder it is ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", FOLDERS)
def test_earlier_export_of_renamed_format_gives_name_of_user(
    name: str, source: SourceModel, results: list[BlockResult], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(
        FORMATS, "variant", FORMATS[name].__class__("variant", FORMATS[name].codec, FORMATS[name].container)
    )
    out = export(source, results, tmp_path / "out", format="variant", card={**CARD, "recipe": "a: 1"})
    config = json.loads((out / "config.json").read_text())
    assert config["quantization_config"]["quant_method"] == name  # as the runtime knows it
    assert earlier_export(out) == "variant"
    verify(out, source, results, format="variant", windows=WINDOWS, tolerance=0.0)


@pytest.mark.parametrize("name", FOLDERS)
def test_earlier_export_of_older_version_is_recognized(
    name: str, source: SourceModel, results: list[BlockResult], tmp_path: Path
) -> None:
    """Older versions recorded only ``quant_method``, which was the format's name."""
    out = export(source, results, tmp_path / "out", format=name)
    edit(out, lambda content: content.pop("omniq_format"))
    assert earlier_export(out) == name
    verify(out, source, results, format=name, windows=WINDOWS, tolerance=0.0)


def test_earlier_export_of_other_folders_is_none(source: SourceModel, tmp_path: Path) -> None:
    assert earlier_export(tmp_path / "missing") is None
    (tmp_path / "empty").mkdir()
    assert earlier_export(tmp_path / "empty") is None
    assert earlier_export(source.folder) is None


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", r"config\.json: "),
        ("[]", r"config\.json has no quantization_config"),
        ('{"quantization_config": 3}', r"config\.json has no quantization_config"),
        (
            '{"quantization_config": {}, "dtype": "float8"}',
            r"config\.json has dtype 'float8', which is not one of float16",
        ),
    ],
)
def test_earlier_export_with_damaged_config_is_named(
    content: str, message: str, source: SourceModel, results: list[BlockResult], tmp_path: Path
) -> None:
    out = export(source, results, tmp_path / "out")
    (out / "config.json").write_text(content)
    with pytest.raises(CorruptFile, match=message):
        earlier_export(out)
    with pytest.raises(CorruptFile, match=message):
        verify(out, source, results)


def test_verify_config_not_describing_weights_is_named(
    source: SourceModel, results: list[BlockResult], tmp_path: Path
) -> None:
    """The check precedes transformers, whose errors would be harder to understand."""
    out = export(source, results, tmp_path / "out")
    whole = (out / "config.json").read_text()

    def refused(error: type[Exception], message: str, change: Callable[[dict[str, Any]], None]) -> None:
        (out / "config.json").write_text(whole)
        edit(out, change)
        with pytest.raises(error, match=message):
            verify(out, source, results)

    def group(content: dict[str, Any]) -> dict[str, Any]:
        return content["quantization_config"]["config_groups"]["group_0"]

    refused(CorruptFile, "describe the grid of", lambda content: content["quantization_config"].pop("config_groups"))
    refused(CorruptFile, "describe the grid of", lambda content: group(content)["weights"].update(num_bits="four"))
    refused(CorruptFile, "describe the grid of", lambda content: group(content).update(targets=["Conv2d"]))
    refused(VerificationError, r"cannot be read back|grid is", lambda c: group(c)["weights"].update(num_bits=5))
    refused(
        VerificationError,
        r"q_proj: the grid is Grid\(bits=4, group_size=16.* in the file, Grid\(bits=4, group_size=32",
        lambda content: group(content)["weights"].update(group_size=16),
    )
    refused(
        VerificationError,
        r"mlp\.\w+\.weight has shape \[\d+, \d+\] in the model and \[\d+, \d+\] in the config of the export",
        lambda content: content.update(intermediate_size=96),
    )
    refused(CorruptFile, "does not describe the weights", lambda content: group(content).update(format="dense"))
    refused(CorruptFile, "does not describe the weights", lambda c: c["quantization_config"].pop("dequantize"))
    refused(CorruptFile, r"config\.json: ", lambda content: content.update(model_type="no such model"))


# -- what the runtime lacks -----------------------------------------------------------------------------------------


def test_missing_packages_absent_or_old_names_install_command() -> None:
    assert missing_packages(()) is None
    assert missing_packages(("compressed-tensors>=0.18", "torch")) is None
    assert missing_packages(("torch", "no-such-package>=2", "compressed-tensors>=99")) == (
        "transformers needs no-such-package>=2, compressed-tensors>=99 to open it, which this environment lacks "
        "(pip install 'no-such-package>=2' 'compressed-tensors>=99')"
    )


def test_verify_without_runtime_package_runs_block_by_block(
    source: SourceModel, results: list[BlockResult], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "compressed_tensors", None)
    out = export(source, results, tmp_path / "out")
    report = verify(out, source, results, windows=WINDOWS, tolerance=0.0)
    assert "pip install 'compressed-tensors>=0.18'" in str(report.lacking)
    assert report.windows == 2
    own = export(source, results, tmp_path / "own", format="omniq")
    assert verify(own, source, results, format="omniq", windows=WINDOWS, tolerance=0.0).lacking is None
