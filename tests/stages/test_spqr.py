# SPDX-License-Identifier: Apache-2.0
"""The SpQR stage: it lowers the error of a block, resumes to the same bits, and is read back from an export."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from omniq.api import load
from omniq.calibration.gram import GramModule
from omniq.cli.command import main
from omniq.errors import UserError
from omniq.grid.affine import Grid
from omniq.grid.quantized_scales import QuantizedScales
from omniq.quantizers.clipping import Searched
from omniq.stages import SpQR
from omniq.storage.block_result import BlockResult
from tests.helpers.runs import write_run
from tests.helpers.stages import Stop, fit, fitted, tiny_task

GRID = Grid(3, 16)


@pytest.mark.parametrize("symmetric", [False, True])
def test_spqr_stage_summary_counts_outliers_and_error_is_lower(tmp_path: Path, symmetric: bool) -> None:
    grid, errors = Grid(3, 16, symmetric), {}
    for name, method in (("spqr", SpQR()), ("bare", SpQR(0, 0, 0))):
        task = tiny_task(grid, samples=8)
        fitted(method, task, tmp_path / name)
        assert task.result is not None
        rows = [row.split(",") for row in (tmp_path / name / "losses.csv").read_text().splitlines()[1:]]
        errors[name] = {row[3]: float(row[4]) for row in rows}
        if name == "bare":
            assert all(x.grid == grid and x.outliers is None for x in task.result.linears.values())
            continue
        for linear in task.result.linears.values():
            assert linear.grid.second == QuantizedScales(3, 0)  # zero points of 3 bits need no codes of 3
            assert linear.outliers is not None
            linear.grid.second.encode(linear.scale, 3)
        linears = list(task.result.linears.values())
        weights = sum(x.codes.numel() for x in linears)
        bits = sum(x.bits_per_weight() * x.codes.numel() for x in linears) / weights
        assert task.result.summary["bits_per_weight"] == pytest.approx(bits)
        kept = sum(len(x.outliers.value) for x in linears if x.outliers is not None)
        assert task.result.summary["outliers"] == pytest.approx(kept / weights)
    assert len(errors["spqr"]) == 7
    assert sum(errors["spqr"].values()) < 0.8 * sum(errors["bare"].values())


@pytest.mark.parametrize("options", [{}, {"threshold": 0.0, "act_order": False, "clipping": Searched()}])
@pytest.mark.parametrize("step", [1, 5, 9])
def test_spqr_stage_killed_resumes_to_same_bits(
    tmp_path: Path, options: dict[str, Any], step: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(GramModule, "save_interval", 0.0)

    def module() -> Any:
        return SpQR(batch_size=2, **options).module(tiny_task(GRID, samples=4))

    whole = fit(module(), tmp_path / "whole").task.result
    with pytest.raises(RuntimeError, match="stopped by the test"):
        fit(module(), tmp_path / "cut", Stop(step))
    resumed = (tmp_path / "cut" / "last.ckpt").exists()
    other = fit(module(), tmp_path / "cut", resume=resumed).task.result
    assert resumed or step == 1
    assert whole is not None
    assert other is not None
    for name, linear in whole.linears.items():
        assert torch.equal(linear.codes, other.linears[name].codes)
        assert torch.equal(linear.dequantize(), other.linears[name].dequantize())
        assert linear.grid == other.linears[name].grid
    assert whole.summary == other.summary
    assert (tmp_path / "cut" / "losses.csv").read_text() == (tmp_path / "whole" / "losses.csv").read_text()


def test_spqr_run_exported_is_read_back_to_same_bits(tmp_path: Path) -> None:
    stage = {"class_path": "omniq.stages.SpQR", "init_args": {"zero_bits": 2}}
    assert main(write_run(tmp_path, stages=[stage], export={"format": "omniq"})) == 0  # it verifies codes and logits
    out = tmp_path / "run" / "model"
    result = BlockResult.load(tmp_path / "run" / "blocks" / "000.safetensors")
    linear = result.linears["mlp.up_proj"]
    assert linear.grid.second == QuantizedScales(3, 2)
    entry = json.loads((out / "config.json").read_text())["quantization_config"]["linears"]
    assert entry["model.layers.0.mlp.up_proj"]["second"] == {"scale_bits": 3, "zero_bits": 2, "rows": 16}
    model = load(tmp_path / "run")
    packed = model.model.layers[0].mlp.up_proj
    assert "weight_scale" not in dict(packed.named_buffers())
    for part in ("codes", "scale", "zero_point"):
        assert torch.equal(getattr(packed.quantized(), part), getattr(linear, part))
    assert torch.equal(packed.quantized().dequantize(torch.float16), linear.dequantize(torch.float16))
    wide = AutoModelForCausalLM.from_pretrained(out, dtype=torch.float32).model.layers[0].mlp.up_proj
    assert wide.weight_scale_ends.dtype == torch.float16
    assert torch.equal(wide.quantized().dequantize(), linear.dequantize())


# -- refusals -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("wrong", "told"),
    [
        ({"threshold": -0.1}, r"threshold -0\.1 of SpQR is out of range: give 0 for no outliers"),
        ({"threshold": float("nan")}, "threshold nan of SpQR"),
        ({"scale_bits": 1}, "scale_bits 1 is out of range: give 2 to 8"),
        ({"zero_bits": 9}, "zero_bits 9 is out of range"),
        ({"scale_group": 1}, "scale_group 1 is too small for scales"),
        ({"clipping": Searched("gram")}, "clipping of SpQR does not support weighting 'gram'"),
    ],
)
def test_spqr_invalid_settings_are_refused(wrong: dict[str, Any], told: str) -> None:
    with pytest.raises(UserError, match=told):
        SpQR(**wrong)


@pytest.mark.parametrize("settings_", [{}, {"threshold": 0}])
def test_spqr_in_format_without_place_is_refused_before_run(
    tmp_path: Path, settings_: dict[str, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    stage = {"class_path": "omniq.stages.SpQR", "init_args": settings_}
    assert main(write_run(tmp_path, stages=[stage])) == 2
    assert "quantized scales of this method: use format omniq" in capsys.readouterr().err
    assert not (tmp_path / "run" / "blocks" / "000.safetensors").exists()
    assert SpQR(threshold=0, scale_bits=0, zero_bits=0).leaves == {"grid", "codes"}


def test_omniq_config_with_incomplete_second_level_is_refused() -> None:
    from omniq.runtime.quantizer import OmniqConfig

    entry = {"bits": 3, "group_size": 16, "symmetric": False, "second": {"scale_bits": 3, "zero_bits": 0}}
    with pytest.raises(UserError, match=r"quantization_config\.linears: x lacks rows"):
        OmniqConfig({"x": entry})
