# SPDX-License-Identifier: Apache-2.0
"""Losses of a run: rows in CSV, numbers in TensorBoard, means in the summaries."""

import csv
import errno
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch.loggers import TensorBoardLogger
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from omniq.cli.command import main
from omniq.storage.block_result import BlockResult
from tests.helpers.runs import QUICK, SMALL, configuration, omniquant, write_run


def rows_of(run: Path, name: str) -> list[dict[str, str]]:
    with (run / "blocks" / name).open() as file:
        return list(csv.DictReader(file))


def test_losses_of_run_are_in_csv_tensorboard_and_summary(tmp_path: Path) -> None:
    """CSV has a row for each step, TensorBoard the same numbers under sorted names, the summary their means.

    The last stage adds the losses of the deployed block on calibration and held-out samples.
    """
    stages = [omniquant(epochs=3, transform={"alpha": 0.5}), omniquant(epochs=2, batch_size=2, augmented_loss=True)]
    assert main(write_run(tmp_path, model=SMALL, stages=stages, **QUICK)) == 0
    run = tmp_path / "run"
    assert sorted(path.name for path in (run / "blocks").glob("*.csv")) == [
        "000.0.csv",
        "000.1.csv",
        "001.0.csv",
        "001.1.csv",
    ]
    rows = rows_of(run, "001.0.csv")
    assert [list(row.values())[:4] for row in rows] == [
        ["OmniQuant", str(step + 1), str(step // 3), "loss"] for step in range(9)
    ]
    *steps, deployed, held_out = rows_of(run, "001.1.csv")
    assert [row["pass"] for row in steps] == ["0", "0", "1", "1"]  # batches of two of three samples
    events = EventAccumulator(str(run / "tensorboard/001.0"))
    events.Reload()
    assert events.Tags()["scalars"] == ["block/001/loss"]
    logged = events.Scalars("block/001/loss")
    assert [event.step for event in logged] == list(range(1, 10))
    values = [float(row["value"]) for row in rows]
    assert [event.value for event in logged] == pytest.approx(values, rel=1e-6)
    assert all(value == float(torch.tensor(value)) for value in values)  # written so that they read back exactly
    mean = BlockResult.load(run / "blocks/001.safetensors").summary
    last = [float(row["value"]) for row in steps[-2:]]
    assert mean["OmniQuant 2.loss.last"] == pytest.approx(sum(last) / 2)
    assert mean["OmniQuant 1.loss.first"] == pytest.approx(sum(values[:3]) / 3)
    assert list(deployed.values()) == ["OmniQuant", "4", "1", "deployed_loss", repr(mean["loss"])]
    assert list(held_out.values()) == ["OmniQuant", "4", "1", "held_out_loss", repr(mean["held_out_loss"])]
    events = EventAccumulator(str(run / "tensorboard/001.1"))
    events.Reload()
    assert events.Tags()["scalars"] == [f"block/001/{name}" for name in ("loss", "deployed_loss", "held_out_loss")]
    (event,) = events.Scalars("block/001/held_out_loss")
    assert (event.step, event.value) == (4, pytest.approx(mean["held_out_loss"], rel=1e-6))


def test_losses_of_stage_without_steps_are_deployed_only(tmp_path: Path) -> None:
    """Without held-out samples there is one loss, else there are two."""
    for held_out, names in ((1, ["deployed_loss", "held_out_loss"]), (0, ["deployed_loss"])):
        data = configuration(tmp_path)["data"] | {"held_out": held_out}
        stages = [{"class_path": "omniq.stages.RTN"}]
        out = tmp_path / f"run{held_out}"
        assert main([*write_run(tmp_path, model=SMALL, stages=stages, data=data, **QUICK), "--out", str(out)]) == 0
        for number in ("000", "001"):
            summary = BlockResult.load(out / f"blocks/{number}.safetensors").summary
            found = {row["name"]: float(row["value"]) for row in rows_of(out, f"{number}.0.csv")}
            assert found == {name: summary[name.removeprefix("deployed_")] for name in names}


@pytest.mark.parametrize("moment", ["save", "finalize", "log_metrics", "held_out_loss"])
def test_run_with_disk_full_in_logger_stops_and_resumes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str], moment: str
) -> None:
    """The error is one line, and the same command continues once there is room again."""
    args = write_run(tmp_path, model=SMALL, **QUICK)
    write = getattr(TensorBoardLogger, "log_metrics" if moment == "held_out_loss" else moment)

    def full(logger: TensorBoardLogger, *given: Any) -> None:
        if moment != "held_out_loss" or "block/001/held_out_loss" in given[0]:
            raise OSError(errno.ENOSPC, "No space left on device")
        write(logger, *given)

    with monkeypatch.context() as patch:
        patch.setattr(TensorBoardLogger, write.__name__, full)
        assert main(args) == 2
    said = capfd.readouterr().err
    assert said.startswith(f"omniq: cannot write into {tmp_path / 'run'}")
    assert "No space left on device; free the disk or choose another folder" in said
    assert said.count("\n") == 1
    assert main(args) == 0
    assert [row["name"] for row in rows_of(tmp_path / "run", "001.0.csv")] == 6 * ["loss"] + [
        "deployed_loss",
        "held_out_loss",
    ]
