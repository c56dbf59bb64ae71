# SPDX-License-Identifier: Apache-2.0
"""A run with a stage of the whole model: killed and resumed, with damaged files, exported again, reported."""

import json
import shutil
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from omniq.cli.command import main
from omniq.storage.records import header_digest
from omniq.storage.run_dir import RunDir
from tests.helpers.killing import Attempts
from tests.helpers.recipes import stage
from tests.helpers.reference_run import Reference
from tests.helpers.runs import SMALL, outcome, write_run

EPOCHS, SAMPLES = 4, 3
LAST = "current/model.1.last.ckpt"
FILES = [
    *("blocks/001.safetensors", LAST, "blocks/000.1.safetensors", "blocks/001.1.safetensors", "model_stages.json"),
    *("perplexity.json", "summary.json", "export.json", ".model.partial/model.safetensors", "model"),
]

RESIDENT = pytest.mark.parametrize("tuned", ["model"], indirect=True)  # the files are those of both modes


def end_to_end(**settings: object) -> dict[str, object]:
    return stage("EndToEnd", **{"epochs": EPOCHS, "lr": 1e-2, "patience": EPOCHS, **settings})


@pytest.fixture(scope="module", params=["model", "block"])
def tuned(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Reference]:
    folder = tmp_path_factory.mktemp(request.param)
    args = write_run(folder, model=SMALL, stages=[stage("RTN"), end_to_end(memory=request.param)])
    with Attempts(folder) as attempts:
        first = attempts.run(args, folder / "reference")
        assert first.status == 0, first.output
        yield Reference(folder, args, attempts, first, outcome(folder / "reference"))


def per_pass(tuned: Reference) -> int:
    """Steps of a pass."""
    return SAMPLES if tuned.folder.name.startswith("model") else 1


def finished(tuned: Reference, out: Path) -> Path:
    return Path(shutil.copytree(tuned.folder / "reference", out))


def test_model_stage_run_writes_its_files_in_order(tuned: Reference) -> None:
    files = [name for name in tuned.first.files if name in FILES]
    assert list(dict.fromkeys(files)) == FILES
    assert not list((tuned.folder / "reference/current").iterdir())
    assert "model  EndToEnd  held-out KL" in tuned.first.output
    again = tuned.finish(tuned.folder / "reference")
    assert "model  EndToEnd is finished" in again.output
    assert not again.steps


def test_model_stage_killed_at_end_of_every_pass_resumes_to_same_bits(tuned: Reference, tmp_path: Path) -> None:
    steps, kills = Counter[tuple[str, int]](), 0
    while (attempt := tuned.attempts.run(tuned.args, tmp_path / "run", aim=("after", LAST))).killed:
        steps.update(attempt.steps)
        kills += 1
    assert kills == tuned.first.files.count(LAST) == len(tuned.first.steps) // per_pass(tuned) - 1
    steps.update(attempt.steps)
    assert steps == Counter(tuned.first.steps)  # no step twice
    tuned.finish(tmp_path / "run")


def test_model_stage_killed_at_each_save_resumes_to_same_bits(tuned: Reference, tmp_path: Path) -> None:
    """A run dies in the middle of each of its files, and just before and just after the file gets its name."""
    steps, kills = Counter[tuple[str, int]](), 0
    for name in FILES:
        for moment in ("before", "after") if name == "model" else ("torn", "before", "after"):
            attempt = tuned.attempts.run(tuned.args, tmp_path / "run", aim=(moment, name))
            assert attempt.killed, f"{moment} {name}: {attempt.output}"
            steps.update(attempt.steps)
            kills += 1
    steps.update(tuned.finish(tmp_path / "run").steps)
    assert steps.keys() == set(tuned.first.steps)
    assert sum(steps.values()) - len(steps) <= kills * per_pass(tuned)


@RESIDENT
def test_model_stage_killed_in_losses_writes_them_once(tuned: Reference, tmp_path: Path) -> None:
    for aim in (("torn", "blocks/model.1.csv"), ("after", LAST), ("torn", "blocks/model.1.csv")):
        assert tuned.attempts.run(tuned.args, tmp_path / "run", aim=aim).killed
    tuned.finish(tmp_path / "run")


@RESIDENT
@pytest.mark.parametrize(
    ("name", "damage"),
    [
        ("blocks/000.1.safetensors", "flipped"),
        ("blocks/001.1.safetensors", "truncated"),
        ("blocks/001.1.safetensors", "missing"),
        ("model_stages.json", "truncated"),
        ("model_stages.json", "missing"),
    ],
)
def test_model_stage_with_damaged_file_runs_again(tuned: Reference, tmp_path: Path, name: str, damage: str) -> None:
    path = finished(tuned, tmp_path / "run") / name
    spoil(path, damage)
    last = tuned.finish(tmp_path / "run")
    assert last.steps == tuned.first.steps
    if (name, damage) != ("model_stages.json", "missing"):
        assert str(path) in last.output


@RESIDENT
def test_model_stage_with_damaged_checkpoint_starts_over(tuned: Reference, tmp_path: Path) -> None:
    for damage in ("truncated", "flipped"):
        assert tuned.attempts.run(tuned.args, tmp_path / damage, aim=("after", LAST)).killed
        spoil(tmp_path / damage / LAST, damage)
        last = tuned.finish(tmp_path / damage)
        assert str(tmp_path / damage / LAST) in last.output
        assert last.steps == tuned.first.steps


@RESIDENT
def test_model_stage_runs_again_after_block_is_calibrated_again(tuned: Reference, tmp_path: Path) -> None:
    """Also in the middle of the stage, whose checkpoint belongs to the earlier blocks."""
    out = finished(tuned, tmp_path / "run")
    path = out / "blocks/001.safetensors"
    before = header_digest(path)
    spoil(path, "flipped")
    last = tuned.finish(out)
    if header_digest(path) != before:  # it took other milliseconds, which are in its summary
        assert "the file was made for other codes or scales of its block; EndToEnd of the whole model" in last.output
        assert last.steps == tuned.first.steps
    assert tuned.attempts.run(tuned.args, tmp_path / "middle", aim=("after", LAST)).killed
    spoil(tmp_path / "middle/blocks/000.safetensors", "missing")
    assert tuned.finish(tmp_path / "middle").steps == tuned.first.steps


@RESIDENT
def test_model_stage_rejects_file_of_other_block_or_run(tuned: Reference, tmp_path: Path) -> None:
    """A whole file in the wrong place is refused as a damaged one is."""
    out = finished(tuned, tmp_path / "run")
    shutil.copy(out / "blocks/000.1.safetensors", out / "blocks/001.1.safetensors")
    last = tuned.finish(out)
    assert "belongs to another run or to another path in this run" in last.output
    assert last.steps == tuned.first.steps


@RESIDENT
def test_model_stage_killed_while_damaged_file_is_mended_is_not_finished(tuned: Reference, tmp_path: Path) -> None:
    """Files of two fits are never taken for one result."""
    out = finished(tuned, tmp_path / "run")
    spoil(out / "blocks/000.1.safetensors", "flipped")
    assert tuned.attempts.run(tuned.args, out, aim=("after", "blocks/000.1.safetensors")).killed
    assert "1" not in json.loads((out / "model_stages.json").read_text())
    tuned.finish(out)


@RESIDENT
def test_export_of_run_with_model_stage_holds_tuned_scales(
    tuned: Reference, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = finished(tuned, tmp_path / "run")
    assert main(["export", "--run", str(out), "--out", str(tmp_path / "again")]) == 0
    stored = load_file(tmp_path / "again/model.safetensors")
    with RunDir(out) as folder:
        for index in (0, 1):
            before, after = folder.read_block(index), folder.final_block(index, [1])
            for name, linear in after.linears.items():
                assert torch.equal(stored[f"model.layers.{index}.{name}.weight_scale"], linear.scale)
                assert not torch.equal(linear.scale, before.linears[name].scale)
    (out / "blocks/001.1.safetensors").unlink()
    capsys.readouterr()
    assert main(["export", "--run", str(out), "--out", str(tmp_path / "other")]) == 2
    message = capsys.readouterr().err
    assert str(out / "blocks/001.1.safetensors") in message
    assert "run the quantize command again" in message
    assert not (tmp_path / "other").exists()


@RESIDENT
def test_report_shows_losses_of_model_stage(tuned: Reference, capsys: pytest.CaptureFixture[str]) -> None:
    record = json.loads((tuned.folder / "reference/model_stages.json").read_text())["1"]
    capsys.readouterr()
    assert main(["report", "--run", str(tuned.folder / "reference")]) == 0
    said = " ".join(capsys.readouterr().out.split())
    kl = f"{record['held_out_kl.before']:.4g} before, {record['held_out_kl']:.4g} after"
    assert f"model EndToEnd held-out KL {kl} {record['seconds']:.1f} s" in said


def test_two_model_stages_run_in_order_and_both_again_after_damage_to_first(tmp_path: Path) -> None:
    """The second one begins with the scales of the first; one block stays in floating point."""
    stages = [stage("RTN"), end_to_end(epochs=2), end_to_end(epochs=1, lr=5e-3)]
    args = write_run(tmp_path, model=SMALL, stages=stages, blocks=1)
    run = tmp_path / "run"
    assert main(args) == 0
    whole = outcome(run)
    kl = [whole["model_stages"][key] for key in ("1", "2")]
    assert kl[1]["held_out_kl.before"] == pytest.approx(kl[0]["held_out_kl"], rel=1e-4)
    with RunDir(run) as folder:
        assert folder.final_block(1, [1, 2]).changed_from(folder.read_block(1)) == {}
    (run / "blocks/000.1.safetensors").unlink()
    assert main(args) == 0
    assert outcome(run) == whole


def spoil(path: Path, damage: str) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    if damage == "missing":
        path.unlink()
    else:
        path.write_bytes(content[: len(content) // 2] if damage == "truncated" else content)
