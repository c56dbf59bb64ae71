# SPDX-License-Identifier: Apache-2.0
"""Losses by torch.compile are equal up to rounding, need one graph for all blocks, and resume to the same bits."""

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from torch._dynamo.utils import counters

from omniq.calibration.reconstruction import ReconstructionModule
from omniq.cli.command import main
from omniq.models.source import SourceModel
from tests.helpers.runs import SMALL, configuration, losses, omniquant, outcome, write_run

RTN = {"class_path": "omniq.stages.RTN"}
ROUNDING = {"class_path": "omniq.stages.LearnedRounding", "init_args": {"epochs": 2}}
W4A4 = {"scheme": {"name": "W4A4"}}
needs_compiler = pytest.mark.skipif(not any(map(shutil.which, ("g++", "clang++"))), reason="needs a C++ compiler")


@pytest.fixture(autouse=True)
def as_before() -> Any:
    """Clear compiled graphs and counters before and after each test."""
    torch._dynamo.reset()
    counters.clear()
    yield
    torch._dynamo.reset()


def run(folder: Path, **sections: Any) -> list[str]:
    """The command line of a run of four samples, three of them a full batch and one the rest."""
    data = configuration(folder)["data"] | {"samples": 4}
    return write_run(folder, model=SMALL, data=data, evaluation=None, export={"format": "none"}, **sections)


@needs_compiler
@pytest.mark.slow
@pytest.mark.parametrize(
    ("stages", "sections", "graphs", "rtol"),
    [
        ([omniquant(batch_size=3)], {}, 2, 1e-5),
        ([RTN, ROUNDING], {}, 1, 1e-5),
        ([omniquant(transform={}, augmented_loss=True)], W4A4, None, 0.02),  # codes of activations turn over
    ],
    ids=["clipping", "rounding", "transform"],
)
def test_compiled_run_losses_equal_plain_run(
    tmp_path: Path, stages: list[dict[str, Any]], sections: dict[str, Any], graphs: int | None, rtol: float
) -> None:
    """There is one graph for each shape of a batch, and no further graph for the second block."""
    args = run(tmp_path, stages=stages, **sections)
    assert main([*args, "--out", str(tmp_path / "plain")]) == 0
    assert not counters["stats"]
    assert main([*args, "--out", str(tmp_path / "compiled"), "--compile", "true"]) == 0
    if graphs is not None:
        assert counters["stats"]["unique_graphs"] == graphs + 1  # the check before the run has one
    for block in (0, 1):
        name = f"blocks/{block:03d}.{len(stages) - 1}.csv"
        assert losses(tmp_path / "compiled" / name) == pytest.approx(losses(tmp_path / "plain" / name), rel=rtol)


@pytest.mark.gpu
def test_compiled_run_in_cuda_graph_losses_equal_plain_run(tmp_path: Path) -> None:
    """The steps of both blocks are captured after three warm-up steps."""
    args = run(tmp_path, stages=[omniquant()], trainer={"accelerator": "gpu"}, matmul="ieee")
    for name in ("plain", "compiled"):
        assert main([*args, "--out", str(tmp_path / name), "--compile", str(name == "compiled").lower()]) == 0
    for name in ("blocks/000.0.csv", "blocks/001.0.csv"):
        assert losses(tmp_path / "compiled" / name) == pytest.approx(losses(tmp_path / "plain" / name), rel=1e-3)


@needs_compiler
@pytest.mark.slow
def test_compiled_run_resumed_gives_same_bits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The run stops in the second of two passes; each pass has a full batch and a smaller one."""
    args = [*run(tmp_path, stages=[omniquant(batch_size=3)]), "--compile", "true", "--export.format", "omniq"]
    whole, resumed = tmp_path / "whole", tmp_path / "resumed"
    assert main([*args, "--out", str(whole)]) == 0
    step = ReconstructionModule.training_step
    steps: list[None] = []

    def interrupted(module: ReconstructionModule, indices: Any) -> None:
        steps.append(None)
        if len(steps) == 4:  # the second of the second pass
            raise KeyboardInterrupt
        step(module, indices)

    with monkeypatch.context() as patch:
        patch.setattr(ReconstructionModule, "training_step", interrupted)
        assert main([*args, "--out", str(resumed)]) == 130
    torch._dynamo.reset()
    assert main([*args, "--out", str(resumed)]) == 0
    assert outcome(resumed) == outcome(whole)


def test_compile_without_working_compiler_is_refused_before_first_block(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(function: Any, **options: Any) -> Any:
        raise RuntimeError("no working C++ compiler\nfound")

    args = run(tmp_path)
    capsys.readouterr()  # transformers shows a bar while it writes the model
    monkeypatch.setattr(torch, "compile", broken)
    monkeypatch.setattr(SourceModel, "block", None)
    assert main([*args, "--compile", "true"]) == 2
    assert capsys.readouterr().err == (
        "omniq: compile true: torch.compile does not work here (no working C++ compiler found): fix that, or set "
        "compile to false\n"
    )
