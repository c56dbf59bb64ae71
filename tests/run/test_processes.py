# SPDX-License-Identifier: Apache-2.0
"""Two processes give the result of one process, and a run continues with another number of processes.

Over gloo, as on a machine without GPUs; where there are two, what the processes add up goes over NCCL as well.
``tests/helpers/pair.py`` starts them like ``torchrun``, which starts one run too.
"""

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from omniq.cli.command import main
from omniq.storage.block_result import BlockResult
from omniq.storage.sealed import load_tensors
from tests.helpers.pair import Pair
from tests.helpers.runs import SMALL, configuration, losses, omniquant, write_run

TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
SEARCHED = {"class_path": "omniq.quantizers.clipping.Searched"}
RTN = {"class_path": "omniq.stages.RTN", "init_args": {"clipping": SEARCHED}}
LEARNED = {"clipping": {"class_path": "omniq.quantizers.clipping.LWC", "init_args": {"initial": SEARCHED}}}


def prepared(
    folder: Path, stages: list[dict[str, Any]], samples: int = 8, held_out: int = 2, family: str = "llama", **more: Any
) -> list[str]:
    """The command line of a run whose samples two processes can share; ``more`` sections."""
    data = configuration(folder)["data"] | {"samples": samples, "held_out": held_out}
    more |= {"stages": stages, "data": data, "evaluation": None, "export": {"format": "none"}}
    return write_run(folder, family, SMALL if family == "llama" else None, **more)


@pytest.fixture(params=["cpu", pytest.param("gpu", marks=pytest.mark.gpu)])
def where(request: pytest.FixtureRequest) -> dict[str, Any]:
    """Sections for two processes over gloo, or over NCCL with a GPU each."""
    if request.param == "gpu" and torch.cuda.device_count() < 2:
        pytest.skip("needs two CUDA devices")
    return {"trainer": {"accelerator": request.param}, "matmul": "ieee"}  # TF32 makes much of a last bit


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Pair]:
    with Pair(tmp_path_factory.mktemp("pair")) as pair:
        yield pair


def together(pair: Pair, args: list[str], out: Path) -> None:
    ends = pair.run([*args, "--out", str(out)])
    assert ends.statuses == [0, 0], ends.outputs


def alone(args: list[str], out: Path) -> None:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # as in the other processes: sums inside a product depend on it
    try:
        assert main([*args, "--out", str(out)]) == 0
    finally:
        torch.set_num_threads(threads)


def blocks(out: Path) -> list[BlockResult]:
    return [BlockResult.load(path) for path in sorted((out / "blocks").glob("*.safetensors"))]


def assert_same_codes(ours: list[BlockResult], theirs: list[BlockResult]) -> None:
    assert len(ours) == len(theirs) == 2
    for one, other in zip(ours, theirs, strict=True):
        assert one.linears.keys() == other.linears.keys()
        for name, linear in one.linears.items():
            for part in ("codes", "scale", "zero_point"):
                assert torch.equal(getattr(linear, part), getattr(other.linears[name], part)), (name, part)
        for key in ("loss", "held_out_loss"):
            assert one.summary[key] == pytest.approx(other.summary[key], rel=1e-12)  # measured: 3e-16


def test_rtn_of_two_processes_has_codes_of_one(pair: Pair, tmp_path: Path, where: dict[str, Any]) -> None:
    """Second moments are exact sums, so the searched range does not depend on the number of processes."""
    args = prepared(tmp_path, [RTN], **where)
    alone(args, tmp_path / "one")
    together(pair, args, tmp_path / "two")
    assert_same_codes(blocks(tmp_path / "two"), blocks(tmp_path / "one"))


def test_omniquant_of_two_processes_equals_one_with_larger_batch(
    pair: Pair, tmp_path: Path, where: dict[str, Any]
) -> None:
    """DDP averages the gradients and the CSV file the losses of two processes with one sample a step."""
    alone(prepared(tmp_path / "a", [omniquant(batch_size=2, **LEARNED)], **where), tmp_path / "one")
    together(pair, prepared(tmp_path / "b", [omniquant(batch_size=1, **LEARNED)], **where), tmp_path / "two")
    for name in ("blocks/000.0.csv", "blocks/001.0.csv"):
        ours, theirs = losses(tmp_path / "two" / name), losses(tmp_path / "one" / name)
        assert len(ours) == 8  # two passes of four steps
        assert ours == pytest.approx(theirs, rel=1e-4)  # measured: 3e-7
    for ours, theirs in zip(blocks(tmp_path / "two"), blocks(tmp_path / "one"), strict=True):
        for key in ("OmniQuant.loss.first", "OmniQuant.loss.last", "loss", "held_out_loss"):
            assert ours.summary[key] == pytest.approx(theirs.summary[key], rel=1e-3)  # measured: 3e-7


@pytest.mark.parametrize("norm_lr", [0.0, 1e-3])
def test_learned_rounding_of_two_processes_equals_one(
    pair: Pair, tmp_path: Path, norm_lr: float, where: dict[str, Any]
) -> None:
    """DDP must not wait for the gradients of norms that are not learned."""
    runs = {}
    for name, batch_size in (("one", 2), ("two", 1)):
        learned = {"epochs": 2, "shuffle": False, "norm_lr": norm_lr, "batch_size": batch_size}
        stages = [RTN, {"class_path": "omniq.stages.LearnedRounding", "init_args": learned}]
        runs[name] = prepared(tmp_path / name / "settings", stages, **where)
    alone(runs["one"], tmp_path / "one" / "run")
    together(pair, runs["two"], tmp_path / "two" / "run")
    ours, theirs = (losses(tmp_path / name / "run/blocks/000.1.csv") for name in ("two", "one"))
    assert len(ours) == 8  # two passes of four steps
    assert ours == pytest.approx(theirs, rel=1e-3)


def test_text_written_by_model_of_two_processes_equals_one(pair: Pair, tmp_path: Path, where: dict[str, Any]) -> None:
    """Each process writes its share; a window does not depend on the batch that it is written in."""
    args = prepared(tmp_path, [RTN], **where)
    source = {"class_path": "omniq.data.SelfGenerated", "init_args": {"batch": 3}}
    data = ["--data", str({"source": source, "samples": 8, "length": 16, "held_out": 2})]
    alone([*args, *data], tmp_path / "one")
    together(pair, [*args, *data], tmp_path / "two")
    one, two = (load_tensors(tmp_path / name / "generated.safetensors")[0]["tokens"] for name in ("one", "two"))
    assert one.shape == (10, 16)
    assert torch.equal(one, two)


def test_learned_rounding_held_out_loss_of_two_processes_equals_one(
    pair: Pair, tmp_path: Path, where: dict[str, Any]
) -> None:
    """Each process keeps the same share of its windows from learning, and the losses on them are added."""
    rows = {}
    for name, batch_size in (("one", 2), ("two", 1)):
        learned = {"epochs": 3, "shuffle": False, "batch_size": batch_size, "held_out": 0.25}
        stages = [RTN, {"class_path": "omniq.stages.LearnedRounding", "init_args": learned}]
        args = prepared(tmp_path / name / "settings", stages, **where)
        _ = alone(args, tmp_path / name / "run") if name == "one" else together(pair, args, tmp_path / name / "run")
        lines = (tmp_path / name / "run/blocks/000.1.csv").read_text().splitlines()
        rows[name] = [float(line.split(",")[4]) for line in lines if ",held_out_loss," in line]
    assert len(rows["one"]) == 3 + 1  # each pass, and the windows of data.held_out after the fit
    assert rows["two"] == pytest.approx(rows["one"], rel=1e-4)


@pytest.mark.parametrize("scheme", [{"name": "W4A4KV4", "queries": True}, {"name": "W4A4"}], ids=["all", "inputs"])
def test_let_of_two_processes_equals_one(
    pair: Pair, tmp_path: Path, scheme: dict[str, Any], where: dict[str, Any]
) -> None:
    sections = {"scheme": scheme} | where
    alone(prepared(tmp_path / "a", [omniquant(batch_size=2, transform={})], **sections), tmp_path / "one")
    together(pair, prepared(tmp_path / "b", [omniquant(batch_size=1, transform={})], **sections), tmp_path / "two")
    for name in ("blocks/000.0.csv", "blocks/001.0.csv"):
        ours, theirs = losses(tmp_path / "two" / name), losses(tmp_path / "one" / name)
        assert ours == pytest.approx(theirs, rel=1e-4)  # measured: 2e-7


W4A4 = {"scheme": {"name": "W4A4"}}
TENSOR = {"scheme": {"name": "W3A4", "activation_range": "tensor"}}


@pytest.mark.parametrize(
    ("stage", "settings", "sections"),
    [
        ("GPTQ", {}, {}),
        ("QuantEase", {}, {}),
        ("AWQ", {}, {}),
        ("SmoothQuant", {}, W4A4),
        ("OutlierSuppression", {"samples": 1}, W4A4),  # the second process holds none of them
        ("OutlierSuppression", {"samples": 3}, TENSOR),
        ("GPTQ", {}, TENSOR | {"family": "opt"}),  # whose MLP gets no samples of its own
    ],
)
def test_gram_stage_of_two_processes_is_near_one(
    pair: Pair, tmp_path: Path, stage: str, settings: dict[str, Any], sections: dict[str, Any], where: dict[str, Any]
) -> None:
    """This includes other stages without gradients. Sums over tokens are not exact, so bits may differ."""
    args = prepared(tmp_path, [{"class_path": f"omniq.stages.{stage}", "init_args": settings}], **sections, **where)
    alone(args, tmp_path / "one")
    together(pair, args, tmp_path / "two")
    for ours, theirs in zip(blocks(tmp_path / "two"), blocks(tmp_path / "one"), strict=True):
        different = sum(int((ours.linears[n].codes != theirs.linears[n].codes).sum()) for n in ours.linears)
        assert different <= 0.01 * sum(linear.codes.numel() for linear in ours.linears.values())
        assert ours.summary["loss"] == pytest.approx(theirs.summary["loss"], rel=0.02)


def test_stages_of_two_processes_killed_between_resume_to_same_codes(pair: Pair, tmp_path: Path) -> None:
    """The result of a stage is stored once in the run directory, where all processes read it."""
    args = prepared(tmp_path, [omniquant(**LEARNED, transform={"alpha": 0.5}), {"class_path": "omniq.stages.GPTQ"}])
    together(pair, args, tmp_path / "whole")
    out = tmp_path / "run"
    ends = pair.run([*args, "--out", str(out)], kill_at=out / "current/000.0.block")
    assert ends.statuses[1] == -9
    together(pair, args, out)
    assert_same_codes(blocks(out), blocks(tmp_path / "whole"))


def test_quantease_of_two_processes_killed_resumes_to_same_codes(pair: Pair, tmp_path: Path) -> None:
    """The kill follows the first checkpoint, while each process sweeps its own rows."""
    args = prepared(tmp_path, [{"class_path": "omniq.stages.QuantEase", "init_args": {"sweeps": 20}}])
    together(pair, args, tmp_path / "whole")
    out = tmp_path / "run"
    assert pair.run([*args, "--out", str(out)], kill_at=out / "current/000.0.last.ckpt").statuses[1] == -9
    together(pair, args, out)
    assert_same_codes(blocks(out), blocks(tmp_path / "whole"))
    assert (out / "blocks/000.0.csv").read_text() == (tmp_path / "whole/blocks/000.0.csv").read_text()


@pytest.mark.slow
@pytest.mark.parametrize("then", [1, 2])
def test_run_of_two_processes_killed_continues_with_one_or_two(pair: Pair, tmp_path: Path, then: int) -> None:
    """One of two processes is killed in the second block, and the other one fails at once.

    Two processes then give the result of a whole run. One process repeats the second block from the saved streams.
    """
    args, out = prepared(tmp_path, [omniquant(epochs=40, **LEARNED)]), tmp_path / "run"
    ends = pair.run([*args, "--out", str(out)], kill_at=out / "current/001.0.last.ckpt")
    assert ends.statuses[1] == -9
    assert ends.statuses[0] not in (0, -9)
    assert "Connection" in ends.outputs[0]  # closed, or reset, by peer
    assert ends.seconds_after_kill < 20
    assert not (out / "blocks/001.safetensors").exists(), "the kill came too late to show anything"
    first = (out / "blocks/000.safetensors").read_bytes()
    if then == 2:
        together(pair, args, out)
        together(pair, args, tmp_path / "whole")
        assert_same_codes(blocks(out), blocks(tmp_path / "whole"))
        assert (out / "blocks/001.0.csv").read_text() == (tmp_path / "whole/blocks/001.0.csv").read_text()
    else:
        alone(args, out)
        assert len(losses(out / "blocks/000.0.csv")) == 160
        assert len(losses(out / "blocks/001.0.csv")) == 320  # every sample is a step again
    assert (out / "blocks/000.safetensors").read_bytes() == first


@pytest.mark.slow
def test_torchrun_script_quantizes_and_loads_on_each_process(tmp_path: Path) -> None:
    """All processes find the checkpoint; the second start has nothing left to do."""
    args = [*prepared(tmp_path, [RTN]), "--export.format", "omniq"]
    script = tmp_path / "script.py"
    script.write_text(
        "import sys, omniq\n"
        "run = omniq.quantize(sys.argv[1], config=sys.argv[2], out=sys.argv[3], export={'format': 'omniq'})\n"
        "print(type(omniq.load(run)).__name__)\n"
    )
    command = [*TORCHRUN, str(script), str(tmp_path / "source"), str(tmp_path / "run.yaml"), str(tmp_path / "run")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("block   1") == 1  # the first process speaks for all
    assert done.stdout.count("LlamaForCausalLM") == 2
    alone(args, tmp_path / "run")


def test_processes_error_of_first_is_printed_once(pair: Pair, tmp_path: Path) -> None:
    args = prepared(tmp_path, [RTN])
    together(pair, args, tmp_path / "run")
    ends = pair.run([*args, "--out", str(tmp_path / "run"), "--seed", "5"])
    assert ends.statuses == [2, 2]
    assert "holds a run with other settings: " in ends.outputs[0]
    assert "omniq:" not in ends.outputs[1]


@pytest.mark.parametrize("stage", ["QuantEase", "AWQ", "RTN"])
def test_processes_error_of_all_is_printed_once(pair: Pair, tmp_path: Path, stage: str) -> None:
    """The values are finite in float32, but their squares are not."""
    clipping = {"init_args": {"clipping": SEARCHED}} if stage == "RTN" else {}
    args = prepared(tmp_path, [{"class_path": f"omniq.stages.{stage}"} | clipping])
    file = tmp_path / "source/model.safetensors"
    whole = load_file(file)
    whole["model.layers.1.input_layernorm.weight"] *= 2.0**80
    for name in ("q_proj", "k_proj", "v_proj"):
        whole[f"model.layers.1.self_attn.{name}.weight"] *= 2.0**-80
    save_file(whole, file, metadata={"format": "pt"})
    ends = pair.run([*args, "--out", str(tmp_path / "run")])
    assert ends.statuses == [2, 2]
    assert (
        "block/001 self_attn.q_proj: the Gram matrix is not finite because its inputs are too large" in ends.outputs[0]
    )
    assert "Gram" not in ends.outputs[1]


def test_processes_too_few_tokens_warning_is_printed_once(pair: Pair, tmp_path: Path) -> None:
    args = prepared(tmp_path, [{"class_path": "omniq.stages.GPTQ"}], samples=2)
    ends = pair.run([*args, "--data.length", "12", "--out", str(tmp_path / "run")])
    assert ends.statuses == [0, 0]
    assert "block/000 self_attn.q_proj: 24 tokens for 32 inputs" in ends.outputs[0]
    assert "tokens for" not in ends.outputs[1]


def test_processes_error_at_export_is_printed_once(pair: Pair, tmp_path: Path) -> None:
    """The first process exports alone while the other ones wait for its outcome."""
    args = [*prepared(tmp_path, [RTN]), "--out", str(tmp_path / "run")]
    assert pair.run([*args, "--export.format", "omniq"]).statuses == [0, 0]
    ends = pair.run([*args, "--export.format", "compressed-tensors"])
    assert ends.statuses == [2, 2]
    assert "was written with other settings" in ends.outputs[0]
    assert "omniq:" not in ends.outputs[1]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--data.samples", "7"], "data.samples 7 is not divisible by the 2 processes: give 6"),
        (["--data.held_out", "1"], "data.held_out 1 is not divisible by the 2 processes: give 2"),
        (
            ["--trainer.devices", "1"],
            "trainer.devices 1 means 1 process(es), but 2 were started: remove it, or start 1",
        ),
    ],
)
def test_processes_uneven_shares_are_refused_before_run(
    pair: Pair, tmp_path: Path, options: list[str], message: str
) -> None:
    ends = pair.run([*prepared(tmp_path, [RTN]), *options, "--out", str(tmp_path / "run")])
    assert ends.statuses == [2, 2]
    assert message in ends.outputs[0]
    assert not (tmp_path / "run").exists()


def test_devices_without_launcher_are_refused_with_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    args = prepared(tmp_path, [RTN])
    capsys.readouterr()
    assert main([*args, "--trainer.devices", "2"]) == 2
    message = capsys.readouterr().err
    assert message.count("\n") == 1
    assert "trainer.devices 2 means 2 process(es), but one was started: run torchrun --nproc-per-node 2" in message
