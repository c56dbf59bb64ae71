# SPDX-License-Identifier: Apache-2.0
"""Models and folders that a command cannot use are refused in one line, before any long work."""

import errno
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import huggingface_hub.constants
import pytest
from safetensors.torch import load_file, save_file

from omniq.cli.command import main
from tests.helpers.opening import only_pickle, truncate
from tests.helpers.runs import QUICK, configuration, omniquant, write_config


def test_quantize_hub_names_while_offline_are_refused(
    refused: Callable[..., str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The messages for the model and for the text both say how to give a local path."""
    import datasets

    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    message = refused("--model.path", "someone/no-such-model")
    assert "model.path 'someone/no-such-model'" in message
    assert "give the path of a local folder" in message
    text = {"class_path": "omniq.data.HubText", "init_args": {"path": "someone/no-such-text"}}
    message = refused("--data.source", json.dumps(text))
    assert "HubText.path: 'someone/no-such-text'" in message
    assert "LocalText" in message


def source_with(folder: Path, tmp_path: Path, change: Callable[[Path], None]) -> str:
    """A copy of the model after a change that breaks it."""
    path = tmp_path / "broken"
    shutil.copytree(folder / "source", path)
    change(path)
    return str(path)


def holding(name: str, value: float) -> Callable[[Path], None]:
    def change(path: Path) -> None:
        tensors = load_file(path / "model.safetensors")
        tensors[name].view(-1)[0] = value
        save_file(tensors, path / "model.safetensors", metadata={"format": "pt"})

    return change


def with_config(**changes: Any) -> Callable[[Path], None]:
    def change(path: Path) -> None:
        config = json.loads((path / "config.json").read_text())
        (path / "config.json").write_text(json.dumps({**config, **changes}))

    return change


def retyped(model_type: str) -> Callable[[Path], None]:
    return with_config(model_type=model_type)


@pytest.mark.parametrize("name", ["a" * 300, "/".join(["b" * 200] * 25)], ids=["name", "path"])
def test_paths_beyond_the_limits_are_refused(
    name: str, folder: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    place, run = str(tmp_path / name), ["--config", str(folder / "run.yaml")]
    (tmp_path / "text.yaml").write_text(json.dumps({"evaluation": configuration(folder)["evaluation"]}))
    evaluate = ["evaluate", "--config", str(tmp_path / "text.yaml"), "--model.path"]
    for args in (
        ["quantize", *run, "--out", place],
        ["quantize", *run, "--model.path", place],
        ["export", "--run", str(tmp_path), "--out", place],
        ["report", "--run", place],
        [*evaluate, str(folder / "source"), "--out", place],
    ):
        assert main(args) == 2, args
        errors = capfd.readouterr().err
        assert f"a path of {len(place)} characters, or one of its names, is too long for this filesystem" in errors
        assert errors.count("\n") == 1


def test_out_whose_files_would_exceed_the_limit_is_refused(refused: Callable[..., str], tmp_path: Path) -> None:
    """The folder itself could be made; a name of 250 characters leaves no room for the temporary name of an export."""
    place = tmp_path / "/".join(["b" * 200] * ((4060 - len(str(tmp_path))) // 201))
    place = place / ("c" * (4085 - len(str(place)) - 1))
    assert "is too long for this filesystem" in refused("--out", str(place))


def test_evaluate_out_that_is_a_device_is_refused(
    folder: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """A file that is renamed there would take the place of the device: a pipe stands for /dev/full."""
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "text.yaml").write_text(json.dumps({"evaluation": configuration(folder)["evaluation"]}))
    args = ["evaluate", "--config", str(tmp_path / "text.yaml"), "--model.path", str(folder / "source")]
    assert main([*args, "--out", str(tmp_path / "pipe")]) == 2
    assert "pipe cannot be written: it is not a regular file; give the name of a JSON file" in capfd.readouterr().err
    assert (tmp_path / "pipe").is_fifo()


@pytest.mark.parametrize(
    ("change", "parts"),
    [
        (truncate, ["model.safetensors is truncated or corrupt", "get the file again"]),
        (lambda path: (path / "model.safetensors").unlink(), ["holds no weights: it needs model.safetensors"]),
        (lambda path: (path / "config.json").unlink(), ["config.json cannot be read", "a model folder needs it"]),
        (lambda path: (path / "config.json").write_text("{"), ["config.json is not valid JSON", "get the file again"]),
        (lambda path: (path / "tokenizer.json").unlink(), ["no tokenizer can be read from", "put its files there"]),
        (
            holding("model.norm.weight", 1e5),
            ["model.norm.weight contains values beyond the range of float16: set scheme"],
        ),
        (
            holding("lm_head.weight", float("nan")),
            ["lm_head.weight contains NaN or infinity: download the model's weights"],
        ),
        (only_pickle, ["pytorch_model.bin is a pickle file", "convert the model to safetensors first"]),
        (with_config(hidden_act="nope"), ["config.json describes (KeyError: 'nope'): correct this value"]),
        (with_config(rope_parameters={"rope_type": "nope", "rope_theta": 1e4}), ["(KeyError: 'nope'): correct this"]),
        (with_config(num_hidden_layers=0), ["config.json: the model has no blocks: correct the number of layers"]),
        (with_config(num_hidden_layers=-1), ["config.json: the model has no blocks: correct the number of layers"]),
        (retyped("nope"), ["model type 'nope' is not supported", "update transformers"]),
    ],
    ids=[
        "truncated",
        "no weights",
        "no config",
        "broken config",
        "no tokenizer",
        "large",
        "NaN",
        "pickle",
        "activation",
        "rope",
        "no blocks",
        "negative blocks",
        "type",
    ],
)
def test_quantize_broken_model_is_refused_with_reason(
    change: Callable[[Path], None], parts: list[str], folder: Path, tmp_path: Path, refused: Callable[..., str]
) -> None:
    message = refused("--model.path", source_with(folder, tmp_path, change))
    for part in parts:
        assert part in message


def test_quantize_pickle_file_is_refused_by_name(folder: Path, tmp_path: Path, refused: Callable[..., str]) -> None:
    path = source_with(folder, tmp_path, only_pickle)
    assert "pytorch_model.bin is a pickle file" in refused("--model.path", f"{path}/pytorch_model.bin")


def test_quantize_without_permission_to_write_is_refused(
    folder: Path, monkeypatch: pytest.MonkeyPatch, refused: Callable[..., str]
) -> None:
    real = os.access
    monkeypatch.setattr(os, "access", lambda path, *rest, **more: not Path(path).is_dir() and real(path, *rest, **more))
    assert "cannot be written: no permission in" in refused()


@pytest.mark.parametrize(
    ("scheme", "format", "bits"),
    [("W3A16", "compressed-tensors", 3), ("W3A4", "compressed-tensors", 8), ("W3A4", "omniq", 3)],
)
def test_quantize_on_disk_without_room_is_refused_before_run(
    scheme: str, format: str, bits: int, monkeypatch: pytest.MonkeyPatch, refused: Callable[..., str]
) -> None:
    """The model has 18,432 codes: a byte each, their packed bits, and table, head and norm in float16."""
    needed = 18432 + 18432 * bits // 8 + 2 * (2 * 272 * 32 + 32)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=needed - 1))
    said = refused("--scheme.name", scheme, "--export.format", format)
    assert f"the run writes at least {needed:,} bytes and the disk has {needed - 1:,} free: free some" in said


def test_quantize_on_disk_that_fills_up_stops_and_resumes(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """The error is one line, no partial file remains, and the run can continue."""
    args = write_config(tmp_path / "run.yaml", configuration(folder, **QUICK, stages=[omniquant()]))
    args += ["--out", str(tmp_path / "run")]
    real, left = os.fsync, [5]

    def full(handle: int) -> None:
        left[0] -= 1
        if left[0] < 0:
            raise OSError(errno.ENOSPC, "No space left on device")
        real(handle)

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        assert main(args) == 2
    message = capfd.readouterr().err
    assert message.count("\n") == 1
    assert "No space left on device; free the disk or choose another folder" in message
    assert not [path for path in (tmp_path / "run").rglob("*") if "partial" in path.name]
    assert main(args) == 0
