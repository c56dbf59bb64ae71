# SPDX-License-Identifier: Apache-2.0
"""A run that is killed and started again ends with the bits of an uninterrupted run.

One tiny run (two blocks, two stages of two epochs each, evaluation, export) is the measure; others are killed at random
and at each of their saves, have files damaged, or save their streams more rarely. ``tests/helpers/killing.py`` kills.
"""

import random
import shutil
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest

from tests.helpers.reference_run import Reference
from tests.helpers.runs import SMALL, outcome, write_run

STEPS_PER_PASS = 3
RANDOM_KILLS = 20
# Every file of a run that is written beside its name; of the blocks', those of the second.
FILES = [
    "fingerprint.json",
    "config.yaml",
    "environment.json",
    "companions.json",
    "streams.safetensors",
    "current/001.0.last.ckpt",
    "current/001.0.result.safetensors",
    "current/001.0.block",
    "current/001.1.last.ckpt",
    "blocks/001.safetensors",
    "perplexity.json",
    "summary.json",
    "export.json",
    ".model.partial/model.safetensors",
    "model",
]


def test_run_repeated_gives_same_files(reference: Reference, tmp_path: Path) -> None:
    assert not reference.finish(tmp_path / "run").killed
    assert len(reference.first.steps) == 2 * 2 * 2 * STEPS_PER_PASS  # blocks, stages, epochs
    assert set(FILES) < set(reference.first.files)


@pytest.mark.parametrize("stage", ["OmniQuant", "RTN", "GPTQ"])
def test_run_prints_own_lines_only(reference: Reference, tmp_path: Path, stage: str) -> None:
    """No output of Lightning, transformers, datasets or warnings reaches the terminal."""
    run = reference.first
    if stage != "OmniQuant":
        args = write_run(tmp_path, model=SMALL, stages=[{"class_path": f"omniq.stages.{stage}"}])
        run = reference.attempts.run(args, tmp_path / "run")
    assert run.status == 0, run.output
    for foreign in ("Lightning", "Trainer", "weights_only", "Loading", "it/s", "arning", "deprecated", "-packages"):
        assert foreign not in run.output


def test_run_killed_at_random_moments_resumes_to_same_bits(reference: Reference, tmp_path: Path) -> None:
    """There are twenty SIGKILLs; a run that ends in between is checked, and another one begins."""
    draw = random.Random(0)
    kills, runs, steps, out = 0, 0, Counter[tuple[str, int]](), tmp_path / "run"
    killed_here = 0
    for _ in range(10 * RANDOM_KILLS):
        attempt = reference.attempts.run(reference.args, out, delay=draw.uniform(0, reference.first.seconds / 2))
        steps.update(attempt.steps)
        if attempt.killed:
            kills, killed_here = kills + 1, killed_here + 1
            if kills < RANDOM_KILLS:
                continue
            steps.update(reference.finish(out).steps)
        assert outcome(out) == reference.outcome
        assert steps.keys() == set(reference.first.steps)
        assert sum(steps.values()) - len(steps) <= killed_here * STEPS_PER_PASS  # a kill repeats one pass at most
        if kills == RANDOM_KILLS:
            return
        runs, killed_here, steps, out = runs + 1, 0, Counter(), tmp_path / f"run{runs}"
    pytest.fail(f"{kills} kills only")


def test_run_killed_at_each_save_resumes_to_same_bits(reference: Reference, tmp_path: Path) -> None:
    """A run dies in the middle of each of its files, and just before and just after the file gets its name."""
    out, steps, kills = tmp_path / "run", Counter[tuple[str, int]](), 0
    for name in FILES:
        moments = ("before", "after") if name == "model" else ("torn", "before", "after")
        for moment in moments:
            attempt = reference.attempts.run(reference.args, out, aim=(moment, name))
            steps.update(attempt.steps)
            assert attempt.killed, f"{moment} {name}: {attempt.output}"
            kills += 1
    steps.update(reference.finish(out).steps)
    assert steps.keys() == set(reference.first.steps)
    assert sum(steps.values()) - len(steps) <= kills * STEPS_PER_PASS


def test_run_killed_before_late_block_is_written_repeats_one_pass(reference: Reference, tmp_path: Path) -> None:
    """The next block waits for the file before its first step, so the kill costs one pass."""
    out = tmp_path / "run"
    killed = reference.attempts.run(reference.args, out, aim=("late", "blocks/000.safetensors"))
    assert killed.killed
    assert {block for block, _ in killed.steps} == {"block/000 constant", "block/000 cosine"}
    assert [path.name for path in (out / "current").iterdir() if path.name.startswith("001")] == []
    steps = Counter([*killed.steps, *reference.finish(out).steps])
    assert steps.keys() == set(reference.first.steps)
    assert sum(steps.values()) - len(steps) == STEPS_PER_PASS  # the last pass of the block that was not yet written


def test_run_killed_after_checkpoint_writes_losses_once(reference: Reference, tmp_path: Path) -> None:
    """Rows and half rows behind the last checkpoint are replaced."""
    for aim in (("torn", "blocks/000.0.csv"), ("before", "current/000.0.last.ckpt"), ("torn", "blocks/001.1.csv")):
        assert reference.attempts.run(reference.args, tmp_path / "run", aim=aim).killed
    assert (tmp_path / "run/blocks/001.1.csv").read_text()[-1] != "\n"
    reference.finish(tmp_path / "run")


def test_run_resumed_without_losses_repeats_stage(reference: Reference, tmp_path: Path) -> None:
    out = tmp_path / "run"
    assert reference.attempts.run(reference.args, out, aim=("after", "current/001.1.last.ckpt")).killed
    (out / "blocks/001.1.csv").unlink()
    last = reference.finish(out)
    assert "001.1.csv" in last.output
    assert len(last.steps) == 2 * STEPS_PER_PASS


def test_run_resumed_by_fresh_process_gives_same_bits(reference: Reference, tmp_path: Path) -> None:
    """The result does not depend on how the helper starts its children."""
    out = tmp_path / "run"
    assert reference.attempts.run(reference.args, out, aim=("after", "current/001.1.last.ckpt")).killed
    command = [sys.executable, "-m", "omniq", *reference.args, "--out", str(out)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert outcome(out) == reference.outcome


def test_run_with_bf16_products_resumes_to_same_bits(reference: Reference, tmp_path: Path) -> None:
    """On most CPUs ``matmul: bf16`` uses another library, which must be deterministic too."""
    args = [*reference.args, "--matmul", "bf16"]
    assert reference.attempts.run(args, tmp_path / "run", aim=("after", "current/001.1.last.ckpt")).killed
    for name in ("run", "whole"):
        last = reference.attempts.run(args, tmp_path / name)
        assert last.status == 0, last.output
    assert outcome(tmp_path / "run") == outcome(tmp_path / "whole")


@pytest.mark.parametrize("damage", ["truncated", "flipped"])
@pytest.mark.parametrize(
    ("name", "killed_after"),
    [
        ("blocks/000.safetensors", None),
        ("blocks/001.safetensors", "streams.safetensors"),
        ("streams.safetensors", "current/001.1.last.ckpt"),
        ("current/001.0.last.ckpt", "current/001.0.last.ckpt"),
        ("current/001.1.last.ckpt", "current/001.1.last.ckpt"),
        ("current/001.0.block", "current/001.1.last.ckpt"),
        ("current/001.0.result.safetensors", "current/001.1.last.ckpt"),
        ("perplexity.json", "perplexity.json"),
    ],
)
def test_run_resumed_with_damaged_file_names_and_computes_it_again(
    reference: Reference, tmp_path: Path, name: str, killed_after: str | None, damage: str
) -> None:
    out = tmp_path / "run"
    if killed_after is None:
        shutil.copytree(reference.folder / "reference", out)
    else:
        first = ("after", killed_after)
        assert reference.attempts.run(reference.args, out, aim=first).killed
        if not (out / name).exists():  # the streams of the first block came before the file of the second
            assert reference.attempts.run(reference.args, out, aim=("after", name)).killed
    content = bytearray((out / name).read_bytes())
    if damage == "flipped":
        content[len(content) // 2] ^= 1
    (out / name).write_bytes(content[: len(content) // 2] if damage == "truncated" else content)
    last = reference.finish(out)
    warning = next(line for line in last.output.splitlines() if "removed" in line)
    assert str(out / name) in warning


@pytest.mark.parametrize("name", ["model.safetensors", "config.json"])
def test_run_resumed_with_damaged_export_replaces_it(reference: Reference, tmp_path: Path, name: str) -> None:
    out = tmp_path / "run"
    shutil.copytree(reference.folder / "reference", out)
    content = (out / "model" / name).read_bytes()
    (out / "model" / name).write_bytes(content[: len(content) // 2])
    warning = next(line for line in reference.finish(out).output.splitlines() if "replacing it" in line)
    assert str(out / "model") in warning


def test_run_interrupted_from_keyboard_continues(reference: Reference, tmp_path: Path) -> None:
    """Ctrl-C in a fit prints one line and gives status 130; the run continues from there."""
    command = [sys.executable, "-m", "omniq", *reference.args, "--out", str(tmp_path / "run")]
    code = (
        "import os, signal, sys; from omniq import cli\n"
        "from omniq.stages.modules.omniquant import OmniQuantModule as M\n"
        "signal.signal(signal.SIGINT, signal.default_int_handler)\n"  # a shell's background job ignores it
        "M.training_step = lambda *_: os.kill(os.getpid(), signal.SIGINT)\n"
        "sys.exit(cli.main(sys.argv[1:]))"
    )
    done = subprocess.run([sys.executable, "-c", code, *command[3:]], capture_output=True, text=True, check=False)
    assert done.returncode == 130, done.stderr
    assert done.stderr.splitlines()[-1] == "omniq: interrupted; the same command continues this run"
    reference.finish(tmp_path / "run")


@pytest.mark.parametrize(("every", "saves"), [(0, 0), (1, 1), (2, 0)])  # of two blocks; none after the last
def test_run_saves_streams_as_often_as_asked(reference: Reference, tmp_path: Path, every: int, saves: int) -> None:
    extra = ("--save_streams_every", str(every))
    whole = reference.finish(tmp_path / "whole", extra)
    assert whole.files.count("streams.safetensors") == saves
    killed = reference.attempts.run([*reference.args, *extra], tmp_path / "run", aim=("after", "current/001.0.block"))
    assert killed.killed
    last = reference.finish(tmp_path / "run", extra)
    assert last.steps == reference.first.steps[-2 * STEPS_PER_PASS :]  # the first block is not calibrated again


def test_run_finished_has_nothing_to_do(reference: Reference) -> None:
    again = reference.finish(reference.folder / "reference")
    assert not again.steps
    assert "continuing the run" in again.output
    assert not (reference.folder / "reference/streams.safetensors").exists()
