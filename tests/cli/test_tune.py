# SPDX-License-Identifier: Apache-2.0
"""``omniq tune`` on finished runs and on checkpoints: codes stay, scales improve, the format stays."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from omniq.cli import main
from omniq.storage.run_dir import RunDir
from tests.helpers.runs import write_run
from tests.helpers.tiny import save_tiny

SYMMETRIC = {"name": "W4A16g32", "symmetric": True}
MODEL = {"hidden_size": 64, "intermediate_size": 128, "num_attention_heads": 2, "num_key_value_heads": 1}


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a finished run in ``run`` and its checkpoint in compressed-tensors' format."""
    folder = tmp_path_factory.mktemp("finished")
    command = write_run(
        folder, model=MODEL, scheme=SYMMETRIC, stages=["omniq.stages.RTN"], evaluation=None,
        export={"format": "compressed-tensors", "prompt": None},
    )  # fmt: skip
    assert main(command) == 0
    return folder


def foreign_checkpoint(export: Path, out: Path) -> Path:
    """A copy of an export without the marks of omniq, as another program would write it."""
    shutil.copytree(export, out)
    for name in ("README.md", "recipe.yaml", ".omniq-export.json"):
        (out / name).unlink(missing_ok=True)
    config = json.loads((out / "config.json").read_text())
    config.pop("omniq_format", None)
    (out / "config.json").write_text(json.dumps(config))
    return out


def tuned_tensors(run: Path, blocks: int = 2, stage: int = 1) -> list[dict[str, torch.Tensor]]:
    """All tensors of the tuned blocks."""
    folder = RunDir(run)
    return [dict(folder.final_block(index, [stage]).tensors_by_name()) for index in range(blocks)]


def data_options(finished: Path) -> list[str]:
    source = ["--data.source=omniq.data.LocalText", f"--data.source.path={finished / 'text.txt'}"]
    return [*source, "--data.samples=3", "--data.length=24", "--data.held_out=1", "--trainer.accelerator=cpu"]


def test_tune_of_a_run_keeps_codes_and_lowers_held_out_kl(finished: Path, tmp_path: Path) -> None:
    assert main(["tune", "--run", str(finished / "run"), "--out", str(tmp_path / "tuned")]) == 0
    before, after = RunDir(finished / "run"), RunDir(tmp_path / "tuned")
    for index in range(2):
        old, new = before.read_block(index), after.final_block(index, [1])
        for name, linear in old.linears.items():
            assert torch.equal(linear.codes, new.linears[name].codes)
            assert not torch.equal(linear.scale, new.linears[name].scale)
    stage = json.loads((tmp_path / "tuned" / "model_stages.json").read_text())["1"]
    assert stage["held_out_kl"] < stage["held_out_kl.first"]
    config = json.loads((tmp_path / "tuned" / "model" / "config.json").read_text())
    assert config["quantization_config"]["quant_method"] == "compressed-tensors"


@pytest.mark.parametrize("form", ["compressed-tensors", "gptq", "awq"])
def test_tune_of_a_foreign_checkpoint_equals_tune_of_its_run(finished: Path, tmp_path: Path, form: str) -> None:
    export = ["--out", str(tmp_path / "export"), "--export.format", form]
    assert main(["export", "--run", str(finished / "run"), *export]) == 0
    checkpoint = foreign_checkpoint(tmp_path / "export", tmp_path / "foreign")
    assert main(["tune", "--run", str(finished / "run"), "--out", str(tmp_path / "a"), "--export.format", "none"]) == 0
    base = ["--model.path", str(finished / "source"), "--export.format", "none", *data_options(finished)]
    assert main(["tune", "--checkpoint", str(checkpoint), "--out", str(tmp_path / "b"), *base]) == 0
    for ours, theirs in zip(tuned_tensors(tmp_path / "a"), tuned_tensors(tmp_path / "b"), strict=True):
        assert ours.keys() == theirs.keys()
        for name, value in ours.items():
            assert torch.equal(value, theirs[name]), name


def test_tune_again_continues_and_changes_no_bit(finished: Path, tmp_path: Path) -> None:
    command = ["tune", "--run", str(finished / "run"), "--out", str(tmp_path / "tuned"), "--export.format", "none"]
    assert main(command) == 0
    first = tuned_tensors(tmp_path / "tuned")
    assert main(command) == 0
    for before, after in zip(first, tuned_tensors(tmp_path / "tuned"), strict=True):
        assert all(torch.equal(value, after[name]) for name, value in before.items())


def test_tune_of_a_run_that_stopped_in_its_last_stage_is_refused(
    finished: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    first = ["tune", "--run", str(finished / "run"), "--out", str(tmp_path / "a"), "--export.format", "none"]
    assert main(first) == 0
    (tmp_path / "a" / "model_stages.json").unlink()
    capsys.readouterr()
    assert main(["tune", "--run", str(tmp_path / "a"), "--out", str(tmp_path / "b")]) == 2
    assert "the run is not finished (2 of 2 blocks): continue it first" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "give either --run RUN"),
        (["--run", "{run}", "--checkpoint", "{run}"], "give either --run RUN"),
        (["--run", "{run}"], "--out is missing"),
        (["--run"], "--run has no value"),
        (["--run", "{folder}", "--out", "{out}"], "is not a run directory"),
        (["--checkpoint", "{folder}", "--out", "{out}"], "give a run directory, or a folder with a quantized model"),
        (["--run", "{run}", "--out", "{out}", "--data.held_out", "0"], "data.held_out 0"),
        (["--run", "{run}", "--out", "{out}", "--scheme.name", "W3A16g32"], "set scheme as the checkpoint has it"),
        (["--run", "{run}", "--out", "{out}", "--model.path", "{other}"], "another model"),
        (["--checkpoint", "{foreign}", "--out", "{out}", "--model.path", "{other}", *data_options(Path("{folder}"))],
         "differs from the model in model.path"),
        (["--checkpoint", "{float}", "--out", "{out}", "--model.path", "{other}"], "not integers on a uniform grid"),
    ],
)  # fmt: skip
def test_tune_bad_input_gets_one_line(
    finished: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], message: str
) -> None:
    places: dict[str, Any] = {"run": finished / "run", "folder": finished, "out": tmp_path / "tuned"}
    if any("{other}" in argument for argument in arguments):
        torch.manual_seed(1)
        save_tiny(tmp_path / "other", "llama", **MODEL)
        perturb(tmp_path / "other")
        places["other"] = tmp_path / "other"
    if "{foreign}" in arguments:
        places["foreign"] = foreign_checkpoint(finished / "run" / "model", tmp_path / "foreign")
    if "{float}" in arguments:
        places["float"] = foreign_checkpoint(finished / "run" / "model", tmp_path / "float")
        config = json.loads((tmp_path / "float" / "config.json").read_text())
        config["quantization_config"]["config_groups"]["group_0"]["weights"]["type"] = "float"
        (tmp_path / "float" / "config.json").write_text(json.dumps(config))
    assert main(["tune", *(argument.format(**places) for argument in arguments)]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert len(error.strip().splitlines()) == 1
    assert not (tmp_path / "tuned").exists()


def perturb(folder: Path) -> None:
    """Change the weights of a model on disk."""
    from safetensors.torch import load_file, save_file

    file = folder / "model.safetensors"
    save_file({name: value + 0.01 for name, value in load_file(file).items()}, file, {"format": "pt"})
