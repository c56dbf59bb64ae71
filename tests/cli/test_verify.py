# SPDX-License-Identifier: Apache-2.0
"""``omniq verify``: what it compares, and what it says about folders that are not whole exports."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from omniq.cli.command import main
from omniq.export.manifest import MANIFEST
from omniq.export.verify import runtimes
from omniq.export.verify.reference import Distance
from tests.helpers.runs import configuration, write_config, write_run

FORMATS = ("compressed-tensors", "omniq", "gguf", "mlx")


@pytest.fixture(scope="module")
def exports(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run rounded to nearest, and an export of it in each format, in a folder of that name."""
    folder = tmp_path_factory.mktemp("verify")
    write_run(folder)
    sections: dict[str, Any] = {"stages": ["omniq.stages.RTN"], "scheme": {"name": "W3A16g32"}, "evaluation": None}
    command = write_config(folder / "run.yaml", configuration(folder, **sections, export={"format": "none"}))
    assert main(command) == 0
    for format in FORMATS:
        options = ["--out", str(folder / format), "--export.format", format, "--export.verify", "false"]
        assert main(["export", "--run", str(folder / "run"), *options]) == 0
    options = ["--out", str(folder / "wide"), "--export.format", "gguf", "--export.container_bits", "4"]
    assert main(["export", "--run", str(folder / "run"), *options]) == 0
    return folder


@pytest.fixture
def copy(exports: Path, tmp_path: Path) -> Path:
    """A copy of the export in format mlx, to be damaged."""
    return Path(shutil.copytree(exports / "mlx", tmp_path / "copy"))


def said(capsys: pytest.CaptureFixture[str], *options: str) -> tuple[int, str]:
    """Status and output of a command, as one line."""
    capsys.readouterr()
    status = main(["verify", *options])
    output = capsys.readouterr()
    return status, " ".join((output.out + output.err).split())


@pytest.mark.parametrize("format", ["compressed-tensors", "omniq", "gguf"])
@pytest.mark.parametrize("with_run", [True, False])
def test_verify_compares_codes_and_logits(
    format: str, with_run: bool, exports: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = ["--run", str(exports / "run")] if with_run else []
    status, text = said(capsys, "--model", str(exports / format), "--runtime", "transformers", *run)
    assert status == 0
    assert ("equal to those of run" if with_run else "codes of 14 linears, as omniq wrote them") in text
    assert f"│ {format} │ transformers │ 73,728 │" in text
    largest = float(text.split("│ 73,728 │")[1].split("│")[0])
    assert 0 < largest < 0.05  # float16 against float32


def test_verify_finds_container_bits_of_an_export(exports: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options = ["--model", str(exports / "wide"), "--run", str(exports / "run"), "--runtime", "transformers"]
    status, text = said(capsys, *options)
    assert "equal to those of run" in text
    assert status == 0


def test_verify_names_runtimes_that_are_not_installed(
    exports: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(runtimes, "find_spec", lambda name: None)
    status, text = said(capsys, "--model", str(exports / "gguf"))
    assert status == 0
    assert "llama.cpp: not installed: pip install 'omniq[gguf]'" in text
    assert "openvino: not installed: pip install 'omniq[openvino]'" in text
    status, text = said(capsys, "--model", str(exports / "mlx"), "--runtime", "mlx")
    assert (status, text) == (2, "omniq: runtime mlx: not installed: pip install 'omniq[mlx]'")


@pytest.mark.parametrize(
    ("runtime", "message"),
    [
        ("vllm", "omniq: runtime 'vllm' is not known: choose one of transformers, llama.cpp, openvino, mlx"),
        ("mlx", "omniq: runtime mlx does not open format gguf: choose transformers, llama.cpp, openvino"),
    ],
)
def test_verify_refuses_a_runtime(
    runtime: str, message: str, exports: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert said(capsys, "--model", str(exports / "gguf"), "--runtime", runtime) == (2, message)


def test_verify_refuses_what_is_not_an_export(
    exports: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = exports / "gguf" / "model.gguf"
    assert said(capsys, "--model", str(file))[1].startswith(f"omniq: model {file} is a file: give the folder")
    assert "does not exist: give the folder" in said(capsys, "--model", str(tmp_path / "none"))[1]
    shutil.copy(file, tmp_path / "model.gguf")
    status, text = said(capsys, "--model", str(tmp_path))
    assert status == 2
    assert "is not an export of omniq: it holds model.gguf, but no README.md or recipe.yaml of omniq" in text


def test_verify_changed_weight_file_is_named(copy: Path, exports: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tensors = load_file(copy / "model.safetensors")
    tensors["model.layers.0.mlp.up_proj.weight"].view(torch.int32)[2, 3] ^= 1
    save_file(tensors, copy / "model.safetensors", metadata={"format": "pt"})
    status, text = said(capsys, "--model", str(copy))
    assert status == 2
    assert "model.safetensors is not the file that omniq wrote: its SHA-256 differs; export it again" in text
    text = said(capsys, "--model", str(copy), "--run", str(exports / "run"))[1]
    assert "is damaged: model.layers.0.mlp.up_proj: codes differ first at [2, 32]" in text


@pytest.mark.parametrize("format", FORMATS)
def test_verify_truncated_weight_file_is_named(
    format: str, exports: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Without a record of digests, the reader itself finds the damage."""
    copy = Path(shutil.copytree(exports / format, tmp_path / "copy"))
    name = "model.gguf" if format == "gguf" else "model.safetensors"
    (copy / name).write_bytes((copy / name).read_bytes()[:-3000])
    (copy / MANIFEST).write_text(json.dumps({"files": [name]}))
    status, text = said(capsys, "--model", str(copy))
    assert status == 2
    assert f"omniq: model {copy} is damaged: {copy / name}" in text


def test_distance_of_known_distributions_is_their_divergence() -> None:
    ours, theirs = torch.tensor([[0.5, 0.25, 0.25]]), torch.tensor([[0.25, 0.25, 0.5, 0.0]])
    found = Distance.of(theirs.log() + 3.0, ours.log() - 1.0)
    assert found.largest == pytest.approx(0.6931472)  # log 2
    assert found.divergence == pytest.approx(0.25 * 0.6931472)
