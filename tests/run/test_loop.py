# SPDX-License-Identifier: Apache-2.0
"""Whole runs on tiny models of all families: their files, and the model in the checkpoint."""

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import yaml
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM

import omniq
from omniq.blocks.weights import load_quantized_weights
from omniq.calibration.module import BlockModule
from omniq.cli.command import main
from omniq.models.source import SourceModel
from omniq.storage.block_result import BlockResult
from tests.helpers.runs import QUICK, SMALL, configuration, omniquant, write_config, write_run, write_text
from tests.helpers.tiny import VOCAB_SIZE

FAMILIES = ("llama", "mistral", "qwen2", "qwen3", "phi3", "gemma", "gemma3_text", "opt")
SIZES: dict[str, dict[str, Any]] = {
    name: SMALL | ({"head_dim": 16} if name in ("mistral", "qwen3", "gemma", "gemma3_text") else {})
    for name in FAMILIES
}
SIZES["opt"] = {"hidden_size": 32, "ffn_dim": 64, "num_attention_heads": 2, "word_embed_proj_dim": 32}
WINDOW = torch.arange(20)[None] % VOCAB_SIZE


def blocks_of(run: Path) -> list[BlockResult]:
    return [BlockResult.load(path) for path in sorted((run / "blocks").glob("*.safetensors"))]


def logits_of_blocks(source: Path, results: list[BlockResult], dtype: torch.dtype) -> Tensor:
    """What omniq's own blocks compute, in the dtype of deployment."""
    model = SourceModel.open(source, dtype=str(dtype).removeprefix("torch."))
    with torch.no_grad():
        hidden, kwargs = model.embed(WINDOW)
        for index, result in enumerate(results):
            block = model.block(index)
            load_quantized_weights(block, result)
            output = block(hidden, **kwargs[index])
            hidden = output[0] if isinstance(output, tuple) else output
        return model.logits(hidden)


@pytest.mark.parametrize("scheme", ["W4A16", "W2A16g32"])
@pytest.mark.parametrize("family", FAMILIES)
def test_quantize_each_family_exports_and_measures(family: str, scheme: str, tmp_path: Path) -> None:
    """Learned clipping runs from the command line to the reopened checkpoint."""
    asked = {"name": scheme, "dtype": "float32"}
    assert main(write_run(tmp_path, family, SIZES[family], scheme=asked, stages=[omniquant(epochs=1)])) == 0
    run, (bits, group) = tmp_path / "run", (4, -1) if scheme == "W4A16" else (2, 32)
    results = blocks_of(run)
    assert len(results) == 2
    for result in results:
        assert {"loss", "held_out_loss", "relative_loss", "relative_held_out_loss", "seconds"} < result.summary.keys()
        assert {"OmniQuant.loss.first", "OmniQuant.loss.last"} < result.summary.keys()
        for linear in result.linears.values():
            assert (linear.grid.bits, linear.grid.group_size) == (bits, group)
            assert linear.codes.max() < 2**bits
    model = AutoModelForCausalLM.from_pretrained(run / "model")
    with torch.no_grad():
        found = model(WINDOW, use_cache=False).logits
    expected = logits_of_blocks(tmp_path / "source", results, torch.float32)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)  # measured: 2.4e-6
    assert json.loads((run / "perplexity.json").read_text())["models"].keys() == {
        "full precision",
        "round to nearest",
        "omniq",
    }


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_quantize_in_half_precision_exports_that_dtype(dtype: str, tmp_path: Path) -> None:
    """The file, the config and the scales have the dtype of deployment."""
    assert main(write_run(tmp_path, model=SMALL, scheme={"name": "W3A16g16", "dtype": dtype, "symmetric": True})) == 0
    run = tmp_path / "run"
    assert json.loads((run / "model/config.json").read_text())["dtype"] == dtype
    with safe_open(run / "model/model.safetensors", "pt") as file:
        kinds = {str(file.get_tensor(name).dtype) for name in file.keys()}  # noqa: SIM118 (not a dict)
    assert f"torch.{dtype}" in kinds
    assert "torch.float32" not in kinds
    scales = [linear.scale for result in blocks_of(run) for linear in result.linears.values()]
    assert {scale.dtype for scale in scales} == {getattr(torch, dtype)}


def test_quantize_learned_loss_is_below_round_to_nearest(tmp_path: Path) -> None:
    """At 2 bits per channel the deployed error of each block is lower on the calibration windows."""
    learned = omniquant(epochs=12, clipping={"initial": {"class_path": "omniq.quantizers.clipping.Searched"}})
    quick = {"scheme": {"name": "W2A16"}, **QUICK}
    args = write_run(tmp_path, model=SMALL, stages=[learned], **quick)
    assert main([*args, "--out", str(tmp_path / "learned")]) == 0
    rtn = [{"class_path": "omniq.stages.RTN"}]
    args = write_config(tmp_path / "rtn.yaml", configuration(tmp_path, stages=rtn, **quick))
    assert main([*args, "--out", str(tmp_path / "rounded")]) == 0
    ours, theirs = (blocks_of(tmp_path / name) for name in ("learned", "rounded"))
    for mine, plain in zip(ours, theirs, strict=True):
        assert mine.summary["loss"] < 0.9 * plain.summary["loss"]


def test_rtn_run_equals_formula_and_baseline(tmp_path: Path) -> None:
    """The stage, the baseline of the evaluation and the formula agree."""
    assert main(write_run(tmp_path, model=SMALL, stages=[{"class_path": "omniq.stages.RTN"}])) == 0
    source = SourceModel.open(tmp_path / "source")
    for index, result in enumerate(blocks_of(tmp_path / "run")):
        block = source.block(index)
        for name, linear in result.linears.items():
            groups = block.get_submodule(name).weight.unflatten(1, (-1, 16))
            lo, hi = groups.amin(-1).clamp(max=0), groups.amax(-1).clamp(min=0)
            scale = ((hi - lo) / 7).half().float()
            zero = (-lo / scale).round().clamp(0, 7)
            codes = ((groups / scale[..., None]).round() + zero[..., None]).clamp(0, 7).flatten(1)
            assert torch.equal(linear.scale.float(), scale)
            assert torch.equal(linear.zero_point.float(), zero)
            assert torch.equal(linear.codes.float(), codes)
    models = json.loads((tmp_path / "run/perplexity.json").read_text())["models"]
    assert models["omniq"]["perplexity"] == pytest.approx(models["round to nearest"]["perplexity"], rel=1e-6)
    assert models["full precision"]["perplexity"] != models["omniq"]["perplexity"]


def test_block_summary_loss_equals_recomputed_error(tmp_path: Path) -> None:
    """The test recomputes the error of the streams on calibration and held-out windows."""
    assert main(write_run(tmp_path, model=SMALL, **QUICK)) == 0
    source = SourceModel.open(tmp_path / "source")
    from omniq.data import Calibration, LocalText

    windows = Calibration(LocalText(str(tmp_path / "text.txt")), 3, 24, held_out=1).windows(source.tokenizer(), seed=2)
    hidden, kwargs = source.embed(torch.cat([windows.calibration, windows.held_out]))
    clean, ours = hidden, hidden
    for index, result in enumerate(blocks_of(tmp_path / "run")):
        block = source.block(index)
        with torch.no_grad():
            clean = block(clean, **kwargs[index])
            load_quantized_weights(block, result)
            ours = block(ours, **kwargs[index])
        for key, part in (("loss", slice(3)), ("held_out_loss", slice(3, 4))):
            error = (clean[part] - ours[part]).double().square().mean().item()
            power = clean[part].double().square().mean().item()
            assert result.summary[key] == pytest.approx(error, rel=1e-4)
            assert result.summary[f"relative_{key}"] == pytest.approx(error / power, rel=1e-4)


@pytest.mark.parametrize("interrupted", [1, 6, 7, 11])
def test_seconds_of_block_over_resumed_processes_add_up(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, interrupted: int
) -> None:
    """The clock advances ten seconds a step; steps lost since the last save do not count."""
    now, seen, track = [0.0], [0], BlockModule.track

    def step(module: BlockModule, name: str, value: Tensor) -> None:
        seen[0] += 1
        if seen[0] == interrupted:
            raise ZeroDivisionError
        now[0] += 10.0
        track(module, name, value)

    monkeypatch.setattr("omniq.report.stopwatch.time", SimpleNamespace(perf_counter=lambda: now[0]))
    monkeypatch.setattr(BlockModule, "track", step)
    args = write_run(tmp_path, model=SMALL, stages=[omniquant(transform={"alpha": 0.5}), omniquant()], **QUICK)
    with pytest.raises(ZeroDivisionError):
        main(args)
    assert main(args) == 0
    assert [result.summary["seconds"] for result in blocks_of(tmp_path / "run")] == [120.0, 120.0]


def test_summary_and_card_hold_facts_of_run(tmp_path: Path) -> None:
    assert main(write_run(tmp_path, model=SMALL, seed=11)) == 0
    run = tmp_path / "run"
    facts = json.loads((run / "summary.json").read_text())
    perplexity = json.loads((run / "perplexity.json").read_text())
    assert facts["seed"] == 11
    assert facts["scheme"] == "W3A16g16"
    assert facts["method"] == "OmniQuant"
    assert facts["base_model"] == "source"  # not where it lies
    assert facts["bits_per_weight"] == pytest.approx(3 + 19 / 16, abs=1e-3)
    assert len(facts["blocks"]) == 2
    assert facts["versions"].keys() > {"torch", "lightning", "transformers", "omniq"}
    (text, values), *_ = facts["perplexity"].items()
    assert text == perplexity["text"]
    assert values == {name: entry["perplexity"] for name, entry in perplexity["models"].items()}
    settings = yaml.safe_load(facts["recipe"])
    assert settings["stages"][0]["init_args"]["epochs"] == 2
    card = (run / "model/README.md").read_text()
    assert "W3A16g16" in card
    assert facts["data"]["digest"] in card


def test_recorded_configuration_repeats_run(tmp_path: Path) -> None:
    assert main(write_run(tmp_path, model=SMALL, **QUICK)) == 0
    again = ["quantize", "--config", str(tmp_path / "run/config.yaml"), "--out", str(tmp_path / "again")]
    assert main(again) == 0
    for ours, theirs in zip(blocks_of(tmp_path / "run"), blocks_of(tmp_path / "again"), strict=True):
        for name, linear in ours.linears.items():
            assert torch.equal(linear.codes, theirs.linears[name].codes)


def test_finished_run_with_other_evaluation_is_measured_again(tmp_path: Path) -> None:
    """The evaluation may change; the perplexities then come from the new text."""
    args = write_run(tmp_path, model=SMALL, export={"format": "none"})
    assert main(args) == 0
    path = tmp_path / "run/perplexity.json"
    before = path.read_text()
    assert main(args) == 0
    assert path.read_text() == before
    assert main([*args, "--evaluation.max_windows", "7"]) == 0
    after = json.loads(path.read_text())
    assert after["models"]["omniq"]["windows"] == 7
    assert after["text"].startswith("the first 7 ")


def test_run_failing_in_later_block_continues(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The finished blocks remain, and the same command continues."""
    args = write_run(tmp_path, model=SMALL, **QUICK)
    with monkeypatch.context() as patch:
        patch.setattr(BlockModule, "track", lambda module, *_: 1 / 0 if module.task.index else None)
        with pytest.raises(ZeroDivisionError):
            main(args)
    assert [path.name for path in (tmp_path / "run/blocks").glob("*.safetensors")] == ["000.safetensors"]
    assert main(args) == 0


def test_run_with_nonfinite_weights_names_block(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The run stops before it calibrates anything on the outputs of this block."""
    args = write_run(tmp_path, model=SMALL, **QUICK)
    weights = tmp_path / "source/model.safetensors"
    tensors = load_file(weights)
    tensors["model.layers.1.mlp.up_proj.weight"][3, 4] = float("nan")
    save_file(tensors, weights, metadata={"format": "pt"})
    assert main(args) == 2
    said = capsys.readouterr().err
    assert said.count("\n") == 1
    assert "model.layers.1: the output of the full-precision model is NaN or infinite: download its" in said
    assert sorted(path.name for path in (tmp_path / "run/blocks").iterdir()) == ["000.0.csv", "000.safetensors"]


def test_quantize_and_load_from_python_give_model(tmp_path: Path) -> None:
    write_run(tmp_path, model=SMALL, evaluation=None)
    run = omniq.quantize(tmp_path / "source", config=tmp_path / "run.yaml", out=str(tmp_path / "run"))
    model = omniq.load(run)
    assert model(WINDOW).logits.shape == (1, 20, VOCAB_SIZE)


def test_run_with_little_text_says_how_many_windows_it_holds(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    args = write_run(tmp_path, stages=["omniq.stages.RTN"], **QUICK)
    tokens = len(write_text(tmp_path / "text.txt", words=40).read_text())  # each byte is a token
    assert main([*args, "--data.samples", "19"]) == 0
    held = (tokens - 24) // 24  # one window is held out
    assert held < 19
    assert f"data.samples 19: the text holds {held} windows of 24 tokens, so the windows repeat parts" in caplog.text
    caplog.clear()
    assert main([*args, "--data.samples", str(held), "--out", str(tmp_path / "other")]) == 0
    assert "data.samples" not in caplog.text
