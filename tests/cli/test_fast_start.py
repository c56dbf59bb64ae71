# SPDX-License-Identifier: Apache-2.0
"""Help, input errors and reports do not import torch, transformers or Lightning, which takes seconds."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from omniq.cli.command import main
from tests.helpers.runs import QUICK, configuration, write_config, write_run

CODE = """
import sys
from omniq.cli import main
try:
    status = main(sys.argv[1:])
except SystemExit as error:
    status = error.code
heavy = [name for name in ("torch", "transformers", "lightning", "datasets") if name in sys.modules]
print("\\n", status, heavy)
"""
RECIPE = {
    "model": {"path": "x"},
    "data": {"source": {"class_path": "omniq.data.Stdlib"}},
    "stages": [{"class_path": "omniq.stages.OmniQuant"}],
    "trainer": {"accelerator": "cpu"},
}


def run(*args: object) -> tuple[str, str]:
    """Run a command line in a process of its own: its last line with status and heavy modules, and its errors."""
    found = subprocess.run([sys.executable, "-c", CODE, *map(str, args)], capture_output=True, text=True, check=True)
    return found.stdout.splitlines()[-1].strip(), found.stderr


@pytest.mark.parametrize("command", ["", "quantize", "evaluate", "export", "report"])
def test_help_imports_no_torch(command: str) -> None:
    assert run(*filter(None, [command]), "--help") == ("0 []", "")


@pytest.mark.parametrize(
    ("change", "options", "reason"),
    [
        ({"quantizer": {"bits": 3}}, [], "quantizer"),
        ({"scheme": {"wbits": 3}}, [], "wbits"),
        ({"scheme": {"name": "W9A16"}}, [], "weight bits 9 are outside 2..8"),
        ({"seed": "many"}, [], "seed"),
        ({"seed": None}, [], "seed: null is not allowed"),
        ({"stages": None}, [], "stages: null is not allowed"),
        ({"data": {"source": "Stdlib", "samples": 0}}, [], "data.samples: 0 is too few"),
        ({"export": {"max_shard_size": -1}}, [], "export.max_shard_size -1.0"),
        ({}, ["--seed", "-1"], "seed -1 is out of range"),
        ({}, ["--stages.epochs", "3", "--batch", "0"], "batch 0 is too small"),
        ({}, ["--trainer.accelerator=cpu", "--matmul", "fp16"], "matmul"),
        ({}, ["--nothing", "1"], "--nothing"),
        ({}, ["--config", "missing.yaml"], "config missing.yaml does not exist"),
        ({}, ["--model.dtype", "float16"], "model.dtype 'float16' is no longer a setting of omniq quantize"),
    ],
)
def test_quantize_mistake_in_light_section_imports_no_torch(
    change: dict[str, object], options: list[str], reason: str, tmp_path: Path
) -> None:
    (tmp_path / "run.yaml").write_text(yaml.safe_dump({**RECIPE, **change}))
    last, errors = run("quantize", "--config", tmp_path / "run.yaml", *options)
    assert last == "2 []"
    assert errors.startswith("omniq: ")
    assert errors.count("\n") == 1
    assert reason in errors


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ("OmniQuant --stages.epochs -3", "stages: OmniQuant.epochs -3 is too small"),
        ("OmniQuant --stages.epoch 3", "Option 'epoch' is not accepted"),
        ("OmniQuant --stages.clipping Searched", "stages: OmniQuant has nothing to learn"),
        ("OmniQuant --stages.clipping.initial.weighting all", "weighting"),
        ("OmniQuant --stages.clipping omniq.quantizers.absolute.LSQ --stages.clipping.initial 5", "initial"),
        ("OmniQuant --stages.transform.lr 2", "transform.lr 2.0 is not between 0 and 1"),
        ("OmniQuant --stages.transform.equivalences=[gate]", "transform.equivalences: 'gate' is not accepted"),
        ("GPTQ --stages.damping 2", "damping 2.0 of GPTQ is outside 0 to 1"),
        ("GPTQ --stages.token_weights equal", "token_weights"),
        ("QuantEase --stages.sweeps 0", "sweeps 0 of QuantEase is too small"),
        ("QuantEase --stages.outliers.fraction 2", "outliers.fraction 2.0 of QuantEase is outside 0 to 0.5"),
        ("SpQR --stages.zero_bits 9", "zero_bits 9 is out of range"),
        ("AWQ --stages.candidates 1", "stages: AWQ.candidates 1 is too small"),
        ("SmoothQuant --stages.alpha 2", "alpha 2.0 is outside 0 to 1"),
        ("OutlierSuppression --stages.samples 0", "stages: OutlierSuppression.samples 0 is too small"),
        ("RTN --stages.clipping LWC", "clipping"),
        ("RTN --stages.bits 3", "Option 'bits' is not accepted"),
        ("LearnedRounding", "stages: LearnedRounding needs a preceding stage"),
        ("QuantEase --stages+ RTN", "stages: RTN would discard the grid and codes"),
        ("Nothing", "Nothing"),
    ],
)
def test_quantize_mistake_in_stage_imports_no_torch(options: str, reason: str) -> None:
    last, errors = run("quantize", "--model.path=x", "--data.source=Stdlib", "--stages+", *options.split())
    assert last == "2 []"
    assert errors.startswith("omniq: ")
    assert errors.count("\n") == 1
    assert reason in errors


def test_help_of_stage_imports_no_torch() -> None:
    assert run("quantize", "--stages.help", "OmniQuant") == ("0 []", "")


def test_evaluate_mistake_imports_no_torch() -> None:
    last, errors = run("evaluate", "--model.path", "x", "--evaluation.source", "Stdlib", "--batch", "many")
    assert last == "2 []"
    assert "batch" in errors


def test_report_imports_no_torch_and_no_class_of_configuration(tmp_path: Path) -> None:
    """The report reads the records of the run and no class that its configuration names."""
    args = write_run(tmp_path, **QUICK)
    assert main(args) == 0
    config = tmp_path / "run/config.yaml"
    content = yaml.safe_load(config.read_text())
    evil = {"class_path": "os.system", "init_args": {"command": f"touch {tmp_path / 'mark'}"}}
    config.write_text(yaml.safe_dump({**content, "trainer": evil, "callbacks": [evil]}))
    assert run("report", "--run", tmp_path / "run") == ("0 []", "")
    assert not (tmp_path / "mark").exists()


def test_export_imports_no_class_of_unused_sections(tmp_path: Path) -> None:
    assert main(write_run(tmp_path, evaluation=None)) == 0
    config = tmp_path / "run/config.yaml"
    content = yaml.safe_load(config.read_text())
    evil = {"class_path": "os.system", "init_args": {"command": f"touch {tmp_path / 'mark'}"}}
    config.write_text(yaml.safe_dump({**content, "trainer": evil, "callbacks": [evil], "evaluation": {"source": evil}}))
    args = ["export", "--run", str(tmp_path / "run"), "--export.verify", "false", "--out"]
    assert main([*args, str(tmp_path / "out")]) == 0
    config.write_text(yaml.safe_dump({**content, "stages": [evil]}))
    assert main([*args, str(tmp_path / "again")]) == 2
    assert not (tmp_path / "mark").exists()


@pytest.mark.parametrize("damage", ["truncated", "header", "empty", "deep"])
def test_report_damaged_block_is_named(tmp_path: Path, damage: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(write_run(tmp_path, **QUICK)) == 0
    block = tmp_path / "run/blocks/001.safetensors"
    whole = block.read_bytes()
    deep = b"[" * 100_000
    content = {
        "truncated": whole[:-1],
        "header": whole[:8] + b"x" + whole[9:],
        "empty": b"",
        "deep": len(deep).to_bytes(8, "little") + deep,
    }[damage]
    block.write_bytes(content)
    capsys.readouterr()
    assert main(["report", "--run", str(tmp_path / "run")]) == 2
    errors = capsys.readouterr().err
    assert f"omniq: {block}: the " in errors
    assert errors.count("\n") == 1


def test_evaluate_config_of_quantize_reads_own_sections_only(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """``out`` and ``batch`` in the file belong to the run, not to the evaluation."""
    args = write_run(tmp_path, batch=3, **QUICK)
    content = configuration(tmp_path)
    write_config(tmp_path / "run.yaml", {**content, "out": str(tmp_path / "run"), "batch": 3})
    assert main(["evaluate", *args[1:], "--device", "cpu", "--out", str(tmp_path / "found.json")]) == 0
    assert json.loads((tmp_path / "found.json").read_text())["results"][content["model"]["path"]]["windows"] == 4
    assert not (tmp_path / "run").exists()
