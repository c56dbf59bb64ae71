# SPDX-License-Identifier: Apache-2.0
"""Runs that write several checkpoints, and codes in wider containers."""

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch

from omniq.cli.command import main
from omniq.config.parse import parse_run
from omniq.errors import UserError
from omniq.export import find_format
from omniq.export.containers.shards import ShardReader
from omniq.export.formats.codec import stored_under
from omniq.grid.affine import Grid
from omniq.storage.run_dir import RunDir
from tests.helpers.published_layouts import gptq_weight
from tests.helpers.runs import configuration, outcome, write_run

RTN = [{"class_path": "omniq.stages.RTN"}]
TWO = [{"format": "awq", "container_bits": 4}, {"format": "gptq"}]
SECTIONS: dict[str, Any] = {"scheme": {"name": "W3A16g32"}, "stages": RTN, "evaluation": None}


def run_of(folder: Path, **sections: Any) -> list[str]:
    return write_run(folder, **{**SECTIONS, **sections})


def refusal(args: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    assert main(args) == 2
    return re.sub(r"\s+", " ", capsys.readouterr().err)


def test_run_with_two_exports_writes_both_folders(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    args = run_of(tmp_path, export=TWO)
    assert main(args) == 0
    run = tmp_path / "run"
    output = re.sub(r"\s+", " ", capsys.readouterr().out)
    assert output.count("codes of 14 linears read back equal") == 2
    with RunDir(run) as folder:
        expected = folder.read_block(1).linears["mlp.up_proj"]
    for name, format, grid in [("model", "awq", Grid(4, 32, True)), ("model-gptq", "gptq", Grid(3, 32))]:
        assert json.loads((run / name / "config.json").read_text())["omniq_format"] == format
        chosen = find_format(format)
        scheme = parse_run([], configuration(tmp_path, **SECTIONS))[0].scheme
        with chosen.container.read(run / name, chosen.codec(scheme)) as reader:
            found = reader.read("model.layers.1.mlp.up_proj")
        assert found.grid == grid
        assert found.dequantize().equal(expected.dequantize())
    before = outcome(run)
    assert main(args) == 0  # finished: both are verified and kept
    assert "writing" not in capsys.readouterr().out
    assert outcome(run) == before


def test_finished_run_with_other_container_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    args, changed = run_of(tmp_path, export={"format": "gptq", "container_bits": 4}), ["--export.container_bits", "8"]
    assert main(args) == 0
    assert "export.container_bits was 4, now 8" in refusal([*args, *changed], capsys)
    other = ["export", "--run", str(tmp_path / "run"), "--out", str(tmp_path / "other"), "--export.format", "gptq"]
    assert main([*other, *changed]) == 0
    assert json.loads((tmp_path / "other/config.json").read_text())["quantization_config"]["bits"] == 8


@pytest.mark.parametrize(
    ("sections", "message"),
    [
        (
            {"export": {"format": "awq"}},
            r"3 bits, only 4: set export.container_bits to 4; formats that can hold it: com",
        ),
        ({"export": [*TWO, {"format": "awq"}]}, "export: format awq is given twice: give each format once"),
        ({"export": [TWO[0], {"format": "none"}]}, "a list of checkpoints has an entry with format none: remove"),
        ({"export": []}, r"export: \[\] is not a list of checkpoints: give entries such as {format: gptq}"),
        ({"export": TWO, "scheme": {"name": "W4A16g32"}}, "container_bits 4: scheme W4A16g32 has no grid of fewer"),
        ({"export": [TWO[1], {"format": "awq"}]}, "export.format awq does not support 3 bits"),
    ],
)
def test_run_with_impossible_export_is_refused_before_blocks(
    sections: dict[str, Any], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert re.search(message, refusal(run_of(tmp_path, **sections), capsys))
    assert not (tmp_path / "run").exists()


def test_run_with_nonzero_zero_points_writes_version_1_of_gptq(tmp_path: Path) -> None:
    scheme = {"name": "W2A16g32", "zero_points": "nonzero", "scale_bits": 8}
    assert main(run_of(tmp_path, scheme=scheme, export={"format": "gptq"})) == 0
    config = json.loads((tmp_path / "run/model/config.json").read_text())["quantization_config"]
    assert (config["checkpoint_format"], config["sym"]) == ("gptq", False)
    group_of = [index // 32 for index in range(64)]
    with RunDir(tmp_path / "run") as folder, ShardReader(tmp_path / "run/model") as shards:
        linear = folder.read_block(0).linears["mlp.up_proj"]
        tensors = stored_under("model.layers.0.mlp.up_proj", {name: shards[name] for name in shards.names})
    assert (gptq_weight(tensors, 2, 1, group_of) == linear.dequantize(torch.float64).numpy()).all()
    assert torch.equal(linear.scale.bfloat16().to(linear.scale.dtype), linear.scale)


@pytest.mark.parametrize(("setting", "value"), [("zero_points", "inner"), ("scale_bits", 8)])
def test_run_with_limits_and_quantized_scales_is_refused(
    setting: str, value: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    stages = [{"class_path": "omniq.stages.SpQR"}]
    args = run_of(tmp_path, scheme={"name": "W3A16g16", setting: value}, stages=stages, export={"format": "omniq"})
    assert f"scheme.{setting} {value}: the last stage stores scales and zero points as codes" in refusal(args, capsys)


def test_list_of_one_export_equals_its_entry(tmp_path: Path) -> None:
    texts = [parse_run([], configuration(tmp_path, export=export))[1] for export in (TWO[0], TWO[:1])]
    assert texts[0] == texts[1]
    with pytest.raises(UserError, match="Option 'formt' is not accepted"):
        parse_run([], configuration(tmp_path, export=[TWO[0], {"formt": "gptq"}]))
