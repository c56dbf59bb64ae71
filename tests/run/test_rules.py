# SPDX-License-Identifier: Apache-2.0
"""Whole runs with ``scheme.rules``: several grids, linears in floating point, resume, export and refusals."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file

from omniq.cli import main
from omniq.storage.block_result import BlockResult
from tests.helpers.killing import Attempts
from tests.helpers.runs import QUICK, SMALL, configuration, omniquant, outcome, write_config, write_run

DOWN, KEY, FIRST_OUT = "re:.*down_proj", "*.k_proj", "model.layers.0.*.o_proj"
RULES = [
    {"layers": DOWN, "name": "W8A16g32", "symmetric": True},
    {"layers": KEY, "name": "W4A16"},
    {"layers": FIRST_OUT, "name": "none"},
]
SCHEME = {"name": "W3A16g16", "rules": RULES}
OMNIQ = {"format": "omniq"}
STAGES = [omniquant(), {"class_path": "omniq.stages.QuantEase", "init_args": {"sweeps": 3}}]


def test_run_with_rules_evaluates_exports_and_verifies(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    args = write_run(tmp_path, model=SMALL, scheme=SCHEME, stages=STAGES, export=OMNIQ)
    assert main(args) == 0
    run = tmp_path / "run"
    assert "verified: " in capsys.readouterr().out
    linears = json.loads((run / "model/config.json").read_text())["quantization_config"]["linears"]
    narrow = {"bits": 3, "group_size": 16, "symmetric": False}
    assert len(linears) == 13  # of 14, one is kept
    for name, entry in linears.items():
        wanted = narrow
        if name.endswith("down_proj"):
            wanted = {"bits": 8, "group_size": 32, "symmetric": True}
        elif name.endswith("k_proj"):
            wanted = {"bits": 4, "group_size": -1, "symmetric": False}
        assert entry == wanted, name
    kept = "model.layers.0.self_attn.o_proj"
    source, stored = load_file(tmp_path / "source/model.safetensors"), load_file(run / "model/model.safetensors")
    assert torch.equal(stored[f"{kept}.weight"], source[f"{kept}.weight"].half())
    summary = json.loads((run / "summary.json").read_text())
    assert summary["kept"] == {kept: f"scheme.rules, {FIRST_OUT}: none"}
    assert summary["scheme"] == f"W3A16g16; {DOWN}: W8A16g32 symmetric; {KEY}: W4A16; {FIRST_OUT}: none"
    results = [BlockResult.load(run / f"blocks/00{index}.safetensors") for index in (0, 1)]
    bits = [
        (linear.bits_per_weight() * linear.codes.numel(), linear.codes.numel())
        for result in results
        for linear in result.linears.values()
    ]
    assert summary["bits_per_weight"] == round(sum(b for b, _ in bits) / sum(n for _, n in bits), 3)
    measured = next(iter(summary["perplexity"].values()))
    assert measured["full precision"] != measured["round to nearest"] != measured["omniq"]


def test_run_with_rules_resumes_after_kills_between_stages(tmp_path: Path) -> None:
    args = write_run(tmp_path, model=SMALL, scheme=SCHEME, stages=STAGES, export=OMNIQ)
    whole, out = tmp_path / "whole", tmp_path / "run"
    with Attempts(tmp_path) as attempts:
        assert attempts.run(args, whole).status == 0
        for aim in ("current/000.0.result.safetensors", "current/001.0.block", "current/001.1.last.ckpt"):
            assert attempts.run(args, out, aim=("after", aim)).killed, aim
        last = attempts.run(args, out)
        assert last.status == 0, last.output
    assert outcome(out) == outcome(whole)


def test_run_with_rules_keeping_whole_block_leaves_it_unchanged(tmp_path: Path) -> None:
    """Queries, keys and values of the block are not quantized either; the export is verified."""
    scheme = {"name": "W4A8KV8", "rules": [{"layers": "model.layers.0.*", "name": "none"}]}
    args = write_run(tmp_path, model=SMALL, scheme=scheme, stages=[omniquant()], export=OMNIQ)
    assert main(args) == 0
    result = BlockResult.load(tmp_path / "run/blocks/000.safetensors")
    assert not result.linears
    source = load_file(tmp_path / "source/model.safetensors")
    for name, tensor in result.tensors.items():
        assert torch.equal(tensor, source[f"model.layers.0.{name}"])
    assert result.summary["loss"] == 0


@pytest.mark.parametrize("range", ["token", "tensor"])
def test_run_with_kept_linears_does_not_quantize_their_inputs(tmp_path: Path, range: str) -> None:
    """The runs verify their exports: transformers computes with integer activations what omniq measured."""
    scheme = {"name": "W8A8", "activation_range": range, "rules": [{"layers": "*.up_proj", "name": "none"}]}
    stages = [{"class_path": "omniq.stages.RTN"}]
    export = {"format": "compressed-tensors" if range == "tensor" else "omniq"}
    assert main(write_run(tmp_path, model=SMALL, scheme=scheme, stages=stages, export=export)) == 0
    result = BlockResult.load(tmp_path / "run/blocks/000.safetensors")
    assert "mlp.up_proj" not in result.linears
    assert "mlp.up_proj.weight" in result.tensors


def test_run_with_kept_linears_lists_them_as_ignored(tmp_path: Path) -> None:
    scheme = {"name": "W4A16g16", "rules": [{"layers": DOWN, "name": "none"}]}
    stages = [{"class_path": "omniq.stages.RTN"}]
    assert main(write_run(tmp_path, model=SMALL, scheme=scheme, stages=stages)) == 0
    config = json.loads((tmp_path / "run/model/config.json").read_text())["quantization_config"]
    assert config["ignore"] == [*(f"model.layers.{index}.mlp.down_proj" for index in (0, 1)), "lm_head"]


@pytest.mark.parametrize("scheme", [{"name": "W4A16g16", "symmetric": True}, {"name": "W4A8g16"}])
def test_run_with_rules_writes_group_for_each_grid(scheme: dict[str, Any], tmp_path: Path) -> None:
    rules = [{"layers": DOWN, "name": "W6A8" if scheme["name"] == "W4A8g16" else "W6A16"}]
    stages = [{"class_path": "omniq.stages.RTN"}]
    assert main(write_run(tmp_path, model=SMALL, scheme={**scheme, "rules": rules}, stages=stages)) == 0
    config = json.loads((tmp_path / "run/model/config.json").read_text())["quantization_config"]
    groups = config["config_groups"].values()
    assert [(group["weights"]["num_bits"], len(group["targets"])) for group in groups] == [(4, 12), (6, 2)]


def test_run_resumed_with_other_rules_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    sections = {"model": SMALL, "stages": [{"class_path": "omniq.stages.RTN"}], **QUICK}
    assert main(write_run(tmp_path, scheme=SCHEME, **sections)) == 0
    rules = [*RULES[:2], {"layers": FIRST_OUT, "name": "W8A16"}]
    assert main(write_run(tmp_path, scheme={**SCHEME, "rules": rules}, **sections)) == 2
    assert "scheme.rules.2.name (was 'none', now 'W8A16')" in capsys.readouterr().err


def test_run_later_file_or_option_replaces_rules(tmp_path: Path) -> None:
    args = write_run(tmp_path, model=SMALL, scheme=SCHEME, stages=[{"class_path": "omniq.stages.RTN"}], **QUICK)
    other = tmp_path / "other.yaml"
    other.write_text(yaml.safe_dump({"scheme": {"rules": [{"layers": "*.q_proj", "name": "none"}]}}))
    option = '--scheme.rules=[{"layers": "*.v_proj", "name": "none"}]'
    for name, more, kept in (("file", ["--config", str(other)], "q_proj"), ("option", [option], "v_proj")):
        assert main([*args, *more, "--out", str(tmp_path / name)]) == 0
        result = BlockResult.load(tmp_path / name / "blocks/000.safetensors")
        grids = {linear.grid.bits for linear in result.linears.values()}
        assert (len(result.linears), grids, f"self_attn.{kept}" in result.linears) == (6, {3}, False)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("rules")
    write_run(folder, model=SMALL)
    return folder


@pytest.fixture
def refused(folder: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> Callable[..., str]:
    """Runs a scheme that must be refused before anything is written, and returns what was said."""

    def run(scheme: dict[str, Any], **sections: Any) -> str:
        content = {**configuration(folder), "scheme": scheme, "out": str(tmp_path / "run"), **sections}
        assert main(write_config(tmp_path / "run.yaml", content)) == 2
        said = capfd.readouterr().err
        assert said.count("\n") == 1
        assert not (tmp_path / "run").exists()
        return said

    return run


@pytest.mark.parametrize(
    ("rules", "parts"),
    [
        (
            [{"layers": "re:.*dwn_proj", "name": "W8A16"}],
            ["layers 're:.*dwn_proj' matches no linear", "model.layers.0.self_attn.q_proj to model.layers.1.mlp.down"],
        ),
        ([{"layers": "lm_head", "name": "none"}], ["layers 'lm_head' matches no linear"]),
        (
            [{"layers": DOWN, "name": "W8A16"}, {"layers": "*.mlp.*", "name": "none"}],
            [f"layers {DOWN!r} has no effect", "later rules match", "model.layers.0.mlp.down_proj", "after"],
        ),
        ([{"layers": "*", "name": "none"}], ["scheme.rules leave every linear in floating point"]),
        (
            [{"layers": DOWN, "name": "W8A16g48"}],
            [
                "group size 48 does not divide the 64 inputs of model.layers.0.mlp.down_proj",
                "use 16, 32, 64",
            ],
        ),
        ([{"layers": DOWN, "name": "W8"}], ["scheme.rules: name 'W8'", DOWN, "not valid", "none leaves"]),
        ([{"layers": DOWN}], ["scheme.rules", "name"]),
        ([{"layers": DOWN, "name": "W8A8"}], ["has activations of 8 bits", "write A16"]),
    ],
)
def test_run_with_impossible_rules_is_refused(
    refused: Callable[..., str], rules: list[dict[str, Any]], parts: list[str]
) -> None:
    said = refused({"name": "W3A16g16", "rules": rules}, export=OMNIQ)
    assert all(part in said for part in parts), said


def test_run_with_rules_keeping_all_linears_is_refused(refused: Callable[..., str]) -> None:
    rules = [{"layers": "model.layers.0.*", "name": "none"}]
    assert "leave every linear in floating point" in refused({"name": "W3A16g16", "rules": rules}, blocks=1)


def test_run_with_several_asymmetric_grids_in_compressed_tensors_is_refused(refused: Callable[..., str]) -> None:
    said = refused({"name": "W4A16g16", "rules": [{"layers": DOWN, "name": "W8A16g16"}]})
    assert "export.format compressed-tensors cannot hold 2 grids of which one is asymmetric" in said
    assert "use format omniq" in said
