# SPDX-License-Identifier: Apache-2.0
"""EndToEnd lowers the held-out KL of a whole model, changes what it says, and keeps its best state."""

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch.callbacks import Callback
from safetensors.torch import load_file
from torch import Tensor

from omniq.calibration.model_task import ModelResult
from omniq.calibration.stage import check_stages
from omniq.calibration.tunable_model import ResidentModel, StreamedModel
from omniq.cli.command import main
from omniq.config.run import Run
from omniq.errors import UserError
from omniq.grid.scheme import Scheme
from omniq.stages import RTN, EndToEnd, QuantEase, SpQR
from omniq.stages.end_to_end import CODES_PER_TOKEN
from omniq.stages.modules.end_to_end import EndToEndModule
from omniq.storage.run_dir import RunDir
from tests.helpers.model_task import TinyModel, tiny_model_task
from tests.helpers.recipes import stage
from tests.helpers.runs import SMALL, configuration, losses, write_run
from tests.helpers.stages import Stop, fit

MODES = pytest.mark.parametrize("memory", ["model", "block"])


def kl(tiny: TinyModel, changes: Any) -> float:
    return ResidentModel(tiny.task, False).held_out(changes).item()


def tuned(tiny: TinyModel, folder: Path, *callbacks: Callback, **settings: Any) -> EndToEndModule:
    module = EndToEnd(**settings).module(tiny.task)
    assert isinstance(module, EndToEndModule)
    fit(module, folder, *callbacks)
    return module


def rows(folder: Path, name: str) -> list[float]:
    return losses(folder / "losses.csv", name)


@pytest.mark.parametrize("first", ["RTN", "QuantEase"])
@MODES
def test_end_to_end_run_lowers_held_out_kl_and_exports_tuned_scales(tmp_path: Path, first: str, memory: str) -> None:
    """Codes, zero points and the files of the blocks stay; the export holds the tuned scales, and is verified."""
    settings = {"epochs": 6, "lr": 1e-2, "vectors_lr": 1e-2, "memory": memory}
    data = configuration(tmp_path)["data"] | {"samples": 6, "held_out": 3}
    assert main(write_run(tmp_path, model=SMALL, data=data, stages=[stage(first), stage("EndToEnd", **settings)])) == 0
    record = json.loads((tmp_path / "run/summary.json").read_text())["model_stages"]["1"]
    assert record["stage"] == "EndToEnd"
    assert 0 < record["held_out_kl"] < 0.97 * record["held_out_kl.before"]
    assert record["loss.last"] < record["loss.first"]
    stored = load_file(tmp_path / "run/model/model.safetensors")
    with RunDir(tmp_path / "run") as folder:
        for index in (0, 1):
            before, after = folder.read_block(index), folder.final_block(index, [1])
            changed = after.changed_from(before)
            assert {name.rpartition(":")[2] for name in changed if name.startswith("linears.")} == {"scale"}
            assert {name for name in changed if name.startswith("tensors.")} == {f"tensors.{n}" for n in after.tensors}
            for name, linear in after.linears.items():
                assert torch.equal(stored[f"model.layers.{index}.{name}.weight_scale"], linear.scale)
            for name, value in after.tensors.items():
                assert torch.equal(stored[f"model.layers.{index}.{name}"], value)


@MODES
def test_end_to_end_keeps_best_state_and_says_its_kl(tmp_path: Path, memory: str) -> None:
    tiny = tiny_model_task(tmp_path / "source", samples=6, held_out=3)
    tuned(tiny, tmp_path / "fit", epochs=5, lr=1e-2, patience=5, memory=memory)
    assert tiny.task.result is not None
    judged = rows(tmp_path / "fit", "held_out_kl")
    assert len(judged) == 6  # before the first pass and after each
    assert tiny.task.notes["held_out_kl.before"] == judged[0]
    assert tiny.task.notes["held_out_kl"] == min(judged) < judged[0]
    assert kl(tiny, tiny.task.result.changes) == pytest.approx(min(judged), rel=1e-5)


@MODES
def test_end_to_end_stops_after_passes_without_gain(tmp_path: Path, memory: str) -> None:
    """At a rate that is far too high, the model stays as it was."""
    tiny = tiny_model_task(tmp_path / "source")
    tuned(tiny, tmp_path / "fit", epochs=20, lr=0.9, patience=3, memory=memory)
    judged = rows(tmp_path / "fit", "held_out_kl")
    assert judged[0] == min(judged)
    assert len(judged) == 4
    assert tiny.task.result is not None
    assert all(value.eq(0).all() for block in tiny.task.result.changes for value in block.values())


def test_end_to_end_learns_codes_too(tmp_path: Path) -> None:
    """With enough text: codes of a tiny model overfit soon."""
    tiny = tiny_model_task(tmp_path / "source", scheme=Scheme("W2A16g16"), samples=24, length=24)
    tuned(tiny, tmp_path / "fit", epochs=12, batch_size=4, codes=True, codes_lr=0.03, patience=12, memory="model")
    assert tiny.task.result is not None
    assert tiny.task.notes["held_out_kl"] < tiny.task.notes["held_out_kl.before"]
    changes = [value for block in tiny.task.result.changes for key, value in block.items() if key.endswith(":codes")]
    assert max(value.abs().max() for value in changes) > 0.5  # so that codes differ


def test_end_to_end_run_with_codes_stores_and_exports_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each code is one more; writing the export compares its codes with those of the run."""

    def one_more(module: EndToEndModule) -> ModelResult:
        blocks = module.changes()
        changes = [{k: torch.full_like(v, float(k.endswith(":codes"))) for k, v in block.items()} for block in blocks]
        return ModelResult(changes)

    monkeypatch.setattr(EndToEndModule, "finish", one_more)
    stages = [stage("RTN"), stage("EndToEnd", epochs=1, codes=True)]
    assert main(write_run(tmp_path, model=SMALL, stages=stages, evaluation=None)) == 0
    with RunDir(tmp_path / "run") as folder:
        for index in (0, 1):
            before, after = folder.read_block(index), folder.final_block(index, [1])
            for name, linear in after.linears.items():
                assert torch.equal(linear.codes, (before.linears[name].codes + 1).clamp(max=7))
                assert torch.equal(linear.scale, before.linears[name].scale)


def test_end_to_end_zero_vectors_rate_keeps_vectors(tmp_path: Path) -> None:
    tiny = tiny_model_task(tmp_path / "source", "opt")
    tuned(tiny, tmp_path / "fit", epochs=2, lr=1e-2, vectors_lr=0.0, patience=9)
    assert tiny.task.result is not None
    for block in tiny.task.result.changes:
        for key, value in block.items():
            assert value.eq(0).all() == (not key.endswith(":scale")), key


@MODES
@pytest.mark.parametrize("scheme", [Scheme("W4A8KV4"), Scheme("W8A8", activation_range="tensor")], ids=str)
def test_end_to_end_with_quantized_activations_lowers_kl(tmp_path: Path, scheme: Scheme, memory: str) -> None:
    tiny = tiny_model_task(tmp_path / "source", scheme=scheme, samples=6, held_out=3)
    tuned(tiny, tmp_path / "fit", epochs=5, lr=3e-3, vectors_lr=3e-3, patience=5, memory=memory)
    assert tiny.task.notes["held_out_kl"] < tiny.task.notes["held_out_kl.before"]


@MODES
def test_end_to_end_first_loss_and_step_equal_between_modes_and_batch_sizes(tmp_path: Path, memory: str) -> None:
    """One step on all samples is the same step, however much is in memory."""
    settings = {"epochs": 1, "lr": 1e-3, "patience": 9}
    found = []
    for name, mode in (("one", "model"), ("other", memory)):
        tiny = tiny_model_task(tmp_path / name / "source")
        module = tuned(tiny, tmp_path / name / "fit", batch_size=3, memory=mode, **settings)
        assert module.streamed == (mode == "block")
        found.append((rows(tmp_path / name / "fit", "loss"), rows(tmp_path / name / "fit", "held_out_kl")))
    assert found[0][0] == pytest.approx(found[1][0], rel=1e-5)
    assert found[0][1] == pytest.approx(found[1][1], rel=1e-3)


class NaNLoss:
    """Makes the loss of some calls NaN, and with it the gradients of the call."""

    def __init__(self, patch: pytest.MonkeyPatch, calls: set[int], kind: type, method: str) -> None:
        self.calls, self.count, self.real = calls, 0, getattr(kind, method)
        patch.setattr(kind, method, lambda model, *args: self(model, *args))

    def __call__(self, model: Any, *args: Any) -> Any:
        number, self.count = self.count, self.count + 1
        found = self.real(model, *args)
        if number not in self.calls:
            return found
        return found * math.nan if isinstance(found, Tensor) else tuple(value * math.nan for value in found)


def break_passes(patch: pytest.MonkeyPatch, memory: str, passes: set[int]) -> None:
    """Make the held-out KL NaN after these passes, counted from 1; pass 0 is the judgement of the start."""
    kind, method = (ResidentModel, "held_out") if memory == "model" else (StreamedModel, "gradients")
    NaNLoss(patch, passes, kind, method)


@MODES
def test_guard_after_bad_pass_goes_back_to_judged_state_at_half_rate(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, memory: str
) -> None:
    """With a patience of one pass: a pass that is not finite is no pass without a gain."""
    break_passes(monkeypatch, memory, {2})
    tiny = tiny_model_task(tmp_path / "source", samples=6, held_out=3)
    module = tuned(tiny, tmp_path / "fit", epochs=4, lr=3e-3, patience=1, memory=memory)
    judged = rows(tmp_path / "fit", "held_out_kl")
    assert [math.isnan(value) for value in judged] == [False, False, True, False, False]
    assert tiny.task.notes["guard"] == "non-finite loss in 1 pass(es): learning rate x 0.5"
    if memory == "block":  # the state after the second step gave the NaN: the third begins where the first ended
        assert judged[3] == judged[1]
    assert tiny.task.notes["held_out_kl"] < judged[0]
    assert all(parameter.isfinite().all() for parameter in module.parameters())


@MODES
def test_guard_gives_up_on_model_as_calibrated(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, memory: str) -> None:
    break_passes(monkeypatch, memory, {2, 3, 4})
    tiny = tiny_model_task(tmp_path / "source", samples=6, held_out=3)
    tuned(tiny, tmp_path / "fit", epochs=9, lr=3e-3, patience=1, memory=memory)
    assert tiny.task.notes["guard"] == "non-finite loss in 3 passes: kept the model as its blocks were calibrated"
    assert tiny.task.result is not None
    assert all(value.eq(0).all() for block in tiny.task.result.changes for value in block.values())
    assert tiny.task.notes["held_out_kl"] == tiny.task.notes["held_out_kl.before"]


def test_guard_after_first_pass_still_judges_start(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The later passes are worse than the start, which must be kept."""
    break_passes(monkeypatch, "model", {1})
    tiny = tiny_model_task(tmp_path / "source")
    tuned(tiny, tmp_path / "fit", epochs=4, lr=0.9, patience=9, memory="model")
    assert tiny.task.notes["held_out_kl"] == tiny.task.notes["held_out_kl.before"]
    assert tiny.task.result is not None
    assert all(value.eq(0).all() for block in tiny.task.result.changes for value in block.values())


@MODES
@pytest.mark.parametrize("codes", [False, True])
def test_end_to_end_stopped_and_resumed_gives_same_bits(tmp_path: Path, memory: str, codes: bool) -> None:
    settings = {"epochs": 4, "lr": 1e-2, "patience": 4, "codes": codes, "memory": memory}
    whole = tiny_model_task(tmp_path / "a")
    tuned(whole, tmp_path / "whole", **settings)
    for step in (2, 3):
        tiny = tiny_model_task(tmp_path / "a")
        with pytest.raises(RuntimeError, match="stopped by the test"):
            tuned(tiny, tmp_path / f"fit{step}", Stop(step * (1 if memory == "block" else 3)), **settings)
        module = EndToEnd(**settings).module(tiny.task)
        fit(module, tmp_path / f"fit{step}", resume=True)
        assert tiny.task.result is not None
        assert whole.task.result is not None
        for ours, theirs in zip(tiny.task.result.changes, whole.task.result.changes, strict=True):
            assert all(torch.equal(ours[key], theirs[key]) for key in theirs)
        assert (tmp_path / f"fit{step}/losses.csv").read_text() == (tmp_path / "whole/losses.csv").read_text()


def test_end_to_end_does_not_resume_fit_of_other_memory_mode(tmp_path: Path) -> None:
    tiny = tiny_model_task(tmp_path)
    saved: dict[str, Any] = {}
    EndToEnd(memory="model").module(tiny.task).on_save_checkpoint(saved)
    assert EndToEnd(memory="model", epochs=7).module(tiny.task).can_resume(saved)
    assert not EndToEnd(memory="block").module(tiny.task).can_resume(saved)


def test_end_to_end_codes_without_enough_text_are_refused() -> None:
    EndToEnd().check_text(1, 10**9)
    EndToEnd(codes=True).check_text(CODES_PER_TOKEN, CODES_PER_TOKEN**2)
    with pytest.raises(UserError) as caught:
        EndToEnd(codes=True).check_text(2000, 10**9)
    assert str(caught.value) == (
        "stages: EndToEnd.codes true: 2,000 tokens of text are too few to learn 1,000,000,000 codes: give "
        f"{10**9 // CODES_PER_TOKEN:,} or more (data.samples times data.length), or set codes to false"
    )


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"epochs": 0}, "stages: EndToEnd.epochs 0 is too small: give 1 or more"),
        ({"batch_size": 0}, "stages: EndToEnd.batch_size 0 is too small: give 1 or more"),
        ({"patience": -1}, "stages: EndToEnd.patience -1 is too small: give 1 or more"),
        ({"lr": 0.0}, "stages: EndToEnd.lr 0.0 is not between 0 and 1: try 0.001"),
        ({"lr": 1.0}, "stages: EndToEnd.lr 1.0 is not between 0 and 1: try 0.001"),
        ({"lr": math.nan}, "stages: EndToEnd.lr nan is not between 0 and 1: try 0.001"),
        ({"codes_lr": -1.0}, "stages: EndToEnd.codes_lr -1.0 is not between 0 and 1: try 0.01"),
        ({"vectors_lr": -0.1}, "stages: EndToEnd.vectors_lr -0.1 is not at least 0 and below 1: try 0.001"),
    ],
)
def test_end_to_end_setting_out_of_range_is_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError) as caught:
        EndToEnd(**settings)
    assert str(caught.value) == message


@pytest.mark.parametrize(
    ("stages", "message"),
    [
        (lambda: [EndToEnd()], "stages: EndToEnd tunes finished blocks: put a stage that quantizes blocks before it"),
        (lambda: [RTN(), EndToEnd(), QuantEase()], "stages: QuantEase quantizes blocks after EndToEnd, which needs"),
        (lambda: [SpQR(), EndToEnd()], "scale codes"),
    ],
)
def test_end_to_end_in_wrong_place_is_refused(stages: Callable[[], list[Any]], message: str) -> None:
    with pytest.raises(UserError) as caught:
        check_stages(stages())
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_end_to_end_after_outliers_and_twice_is_accepted() -> None:
    check_stages([SpQR(scale_bits=0, zero_bits=0), EndToEnd(), EndToEnd(codes=True)])
    run = Run.__new__(Run)
    run.stages = [RTN(), EndToEnd(), EndToEnd()]
    assert list(run.model_stages) == [1, 2]
    assert run.block_stages == run.stages[:1]


def test_end_to_end_without_held_out_windows_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data = configuration(tmp_path)["data"] | {"held_out": 0}
    args = write_run(tmp_path, model=SMALL, data=data, stages=[stage("RTN"), stage("EndToEnd")])
    capsys.readouterr()
    assert main(args) == 2
    message = capsys.readouterr().err
    assert message == "omniq: data.held_out 0: EndToEnd is judged on held-out windows: give 4 or more, such as 8\n"
    assert not (tmp_path / "run").exists()
