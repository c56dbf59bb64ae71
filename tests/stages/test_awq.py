# SPDX-License-Identifier: Apache-2.0
"""AWQ finds the scales of the paper's search, folds them exactly, lowers the error, and resumes."""

from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from omniq.calibration.rounding import round_to_nearest
from omniq.calibration.second_moments import input_grams
from omniq.calibration.stage import Stage
from omniq.calibration.task import BlockTask
from omniq.cli.command import main
from omniq.errors import UserError
from omniq.grid.affine import Grid
from omniq.grid.scheme import Activations
from omniq.models.layout import Layout
from omniq.quantizers.clipping import MinMax, Searched
from omniq.stages import AWQ, GPTQ, RTN, OmniQuant, QuantEase, SmoothQuant
from omniq.stages.modules.awq import log_scale_of, output_error
from omniq.storage.block_result import BlockResult
from omniq.transforms.heads import Heads
from tests.helpers.float64_block import BLOCKS, Float64Block
from tests.helpers.outlier_task import deployed_error, outlier_task, relative
from tests.helpers.runs import SMALL, write_run
from tests.helpers.stages import Stop, fit, fitted, tiny_task
from tests.helpers.tiny import tiny_layout

A16 = Activations()
GROUPED = {"num_attention_heads": 4, "num_key_value_heads": 2}
MODELS = [("llama", {}), ("llama", GROUPED), ("qwen3", {}), ("opt", {})]


def nearest(weight: Tensor, bits: int, group: int) -> Tensor:
    """Rounding to nearest on the min-max grid, one group after the other, in the dtype of the weight."""
    group = weight.shape[1] if group == -1 else group
    out = torch.empty_like(weight)
    for start in range(0, weight.shape[1], group):
        part = weight[:, start : start + group]
        lo, hi = part.amin(1, True).clamp(max=0), part.amax(1, True).clamp(min=0)
        step = (hi - lo) / (2**bits - 1)
        zero = (-lo / step).round()
        out[:, start : start + group] = (((part / step).round() + zero).clamp(0, 2**bits - 1) - zero) * step
    return out


def read_by(task: BlockTask, name: str) -> Tensor:
    """What a linear reads, float64 ``[tokens, i]``."""
    seen: list[Tensor] = []
    handle = task.linear(name).register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    task.run(task.inputs)
    handle.remove()
    return torch.cat([part.flatten(0, -2) for part in seen]).double()


def plain_search(task: BlockTask, readers: tuple[str, ...], share: int) -> tuple[float, Tensor, float]:
    """Equations 4 and 5 on the samples themselves, float64: the best alpha, its scale ``[i]``, its relative error.

    Args:
        share: how many heads in a row read one KV head, and so have one scale; 0 where the input has no heads.
    """
    x = read_by(task, readers[0])
    size = x.abs().mean(0)
    if share:
        by_head = size.view(int(task.block.self_attn.config.num_attention_heads), -1)
        size = torch.cat([heads.mean(0).repeat(share) for heads in by_head.split(share)])
    best = (0.0, torch.ones_like(size), float("inf"))
    for alpha in torch.linspace(0, 1, 20, dtype=torch.float64).tolist():
        scale = size**alpha
        scale = scale / (scale.max() * scale.min()).sqrt()
        error = power = 0.0
        for name in readers:
            weight = task.linear(name).weight.double()
            rounded = nearest(weight * scale, task.grids[name].bits, task.grids[name].group_size)
            error += float(((x / scale) @ rounded.T - x @ weight.T).square().sum())
            power += float((x @ weight.T).square().sum())
        if error / power < best[2]:
            best = (alpha, scale, error / power)
    return best


@pytest.mark.parametrize("group", [-1, 16])
@pytest.mark.parametrize(("family", "model"), MODELS)
def test_awq_scales_equal_plain_search(family: str, model: dict[str, Any], group: int, tmp_path: Path) -> None:
    task = outlier_task(family, 3, A16, **model)
    task.grids = dict.fromkeys(task.grids, Grid(3, group, scale_dtype=torch.float32))
    config = task.block.self_attn.config
    share = config.num_attention_heads // getattr(config, "num_key_value_heads", config.num_attention_heads)
    equivalences = [each for each in task.layout.equivalences if each.kind != "query_key"]
    expected = [plain_search(task, each.readers, share * (each.kind == "value_output")) for each in equivalences]
    before = {name: value.double() for name, value in task.block.state_dict().items()}
    module = fitted(AWQ(), task, tmp_path)
    after = task.block.state_dict()
    found = module.state_dict()
    scales = {name: torch.ones(before[f"{name}.weight"].shape[1]) for name in task.layout.linears}
    for place, (equivalence, (alpha, scale, error)) in enumerate(zip(equivalences, expected, strict=True)):
        assert float(found["alphas"][place]) == pytest.approx(alpha, rel=1e-6)
        assert float(found["least"][place]) == pytest.approx(error, rel=1e-5)  # measured 2e-7
        scales |= dict.fromkeys(equivalence.readers, scale)
    assert max(alpha for alpha, *_ in expected) > 0.2
    for name, scale in scales.items():
        rows = after[f"{name}.weight"].double() / (before[f"{name}.weight"] * scale)
        torch.testing.assert_close(rows, rows[:, :1].expand_as(rows), rtol=1e-5, atol=0)  # rows may have been divided


@pytest.mark.parametrize("label", BLOCKS)
def test_awq_folded_block_computes_same_output(label: str, tmp_path: Path) -> None:
    """In float64, on inputs with an outlier channel, for all layouts of heads."""
    kind, overrides = BLOCKS[label]
    case = Float64Block(kind, **overrides)
    inputs = case.hidden()
    inputs[..., 3] *= 30
    grids = dict.fromkeys(case.layout.linears, Grid(4))
    task = BlockTask(0, case.layout, case.block, grids, inputs, inputs, case.kwargs)
    before, weights = task.run(inputs), {name: value.clone() for name, value in case.tensors.items()}
    module = fit(AWQ().module(task).double(), tmp_path)  # or scales and their reciprocals are rounded to float32
    assert relative(task.run(inputs), before) < 1e-9  # measured 2e-16
    moved = {name for name, value in task.block.named_parameters() if not torch.equal(value, weights[name])}
    assert len(moved) >= len(task.layout.equivalences)
    assert (module.state_dict()["alphas"] > 0).any()


@pytest.mark.parametrize("family", ["llama", "qwen3", "opt"])
@pytest.mark.parametrize("bits", [3, 4])
def test_awq_error_is_below_rounding(family: str, bits: int, tmp_path: Path) -> None:
    errors = {}
    for name, stage in {"rtn": RTN(), "scaled": AWQ(clipping=MinMax()), "clipped": AWQ()}.items():
        errors[name] = deployed_error([stage], outlier_task(family, bits, A16), tmp_path / name)
    assert errors["scaled"] < 0.9 * errors["rtn"]  # measured 0.65 to 0.84
    assert errors["clipped"] < 0.8 * errors["scaled"]  # measured 0.60 to 0.72


def test_awq_with_quantized_activations_lowers_error(tmp_path: Path) -> None:
    plain, scaled = (
        deployed_error([stage], outlier_task("llama", 4, Activations(8, 8, 8)), tmp_path / type(stage).__name__)
        for stage in (RTN(), AWQ())
    )
    assert scaled < 0.8 * plain  # measured 0.55


def test_awq_codes_are_those_of_scaled_block(tmp_path: Path) -> None:
    task = outlier_task("llama", 4, A16)
    result = fitted(AWQ(), task, tmp_path).task.result
    assert result is not None
    grams = input_grams(task)
    for name, linear in result.linears.items():
        expected = round_to_nearest(task.linear(name).weight, task.grids[name], Searched("gram"), grams[name])
        assert torch.equal(linear.codes, expected.codes)
        assert torch.equal(linear.scale, expected.scale)
    for name, tensor in result.tensors.items():
        assert torch.equal(tensor, task.block.get_parameter(name))


def test_awq_before_other_stages_lowers_error(tmp_path: Path) -> None:
    def error(name: str, *stages: Stage) -> float:
        return deployed_error(list(stages), outlier_task("llama", 3, A16), tmp_path / name)

    alone = error("alone", AWQ())
    assert error("gptq", AWQ(), GPTQ()) < 0.9 * alone  # measured 0.78
    assert error("descent", AWQ(), QuantEase(sweeps=6)) < 0.9 * alone  # measured 0.71
    assert error("refined", AWQ(), QuantEase(sweeps=6, start="previous")) < 0.9 * alone  # measured 0.72
    assert error("learned", AWQ(), OmniQuant(epochs=3)) < error("rounded", RTN())
    assert error("smoothed", SmoothQuant(), AWQ()) < error("rounded again", RTN())


def test_awq_of_bfloat16_block_searches_in_float32(tmp_path: Path) -> None:
    task = outlier_task("opt", 3, A16)
    task.block.to(torch.bfloat16)
    task.inputs = task.inputs.bfloat16()
    before = task.run(task.inputs).float()
    module = fitted(AWQ(), task, tmp_path)
    assert module.state_dict()["least"].dtype == torch.float32
    assert relative(task.run(task.inputs).float(), before) < 2e-2  # measured 2e-3
    assert task.result is not None
    assert all(value.isfinite().all() for _, value in task.result.dequantized())


@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 2**31), bits=st.integers(2, 8), grouped=st.booleans(), alpha=st.floats(0, 1))
def test_output_error_from_gram_matrix_equals_error_of_samples(
    seed: int, bits: int, grouped: bool, alpha: float
) -> None:
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(5, 12, generator=generator, dtype=torch.float64)
    x = torch.randn(40, 12, generator=generator, dtype=torch.float64) * torch.logspace(-2, 2, 12, dtype=torch.float64)
    scale = log_scale_of(x.abs().mean(0), alpha).exp()
    grid = Grid(bits, 4 if grouped else -1, scale_dtype=torch.float32)
    found = output_error(weight, (x.T @ x / 40).float(), scale.float(), grid)
    rounded = nearest(weight * scale, bits, 4 if grouped else -1) / scale
    expected = (x @ (rounded - weight).T).square().sum() / 40
    # measured 1e-6, at worst 6e-5 in 3,000; a float32 tie, of a code or a zero point, may also fall the other way
    torch.testing.assert_close(found.double(), expected, rtol=1e-2, atol=1e-6)


@settings(max_examples=25, deadline=None)
@given(sizes=st.lists(st.floats(0, 1e6), min_size=1, max_size=20), alpha=st.floats(0, 1))
def test_log_scale_of_any_sizes_is_centred_ordered_and_finite(sizes: list[float], alpha: float) -> None:
    size = torch.tensor(sizes).float()
    scale = log_scale_of(size, alpha).exp()
    assert scale.isfinite().all()
    assert (scale > 0).all()
    assert float(scale.max() * scale.min()) == pytest.approx(1, rel=1e-4)
    assert (scale[size.argsort()].diff() >= 0).all()
    assert torch.equal(log_scale_of(size, 0), torch.zeros_like(size))


@pytest.mark.parametrize("killed_at", [1, 4])
def test_awq_killed_resumes_to_same_bits(killed_at: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("omniq.stages.modules.awq.AWQModule.save_interval", 0.0)
    whole = fitted(AWQ(candidates=6), tiny_task(Grid(3)), tmp_path / "whole").task
    with pytest.raises(RuntimeError, match="stopped by the test"):
        fit(AWQ(candidates=6).module(tiny_task(Grid(3))), tmp_path / "cut", Stop(killed_at))
    resumed = fit(AWQ(candidates=6).module(tiny_task(Grid(3))), tmp_path / "cut", resume=True).task
    assert (tmp_path / "cut" / "losses.csv").read_bytes() == (tmp_path / "whole" / "losses.csv").read_bytes()
    assert whole.result is not None
    assert resumed.result is not None
    for name, value in whole.block.named_parameters():
        assert torch.equal(value, resumed.block.get_parameter(name))
    torch.testing.assert_close(dict(resumed.result.dequantized()), dict(whole.result.dequantized()), rtol=0, atol=0)


def test_awq_run_summary_has_errors_and_alphas(tmp_path: Path) -> None:
    """The run exports and verifies; the summaries show errors that did not rise."""
    stage = {"class_path": "omniq.stages.AWQ", "init_args": {"candidates": 5}}
    assert main(write_run(tmp_path, model=SMALL, stages=[stage])) == 0
    assert (tmp_path / "run" / "model" / "config.json").exists()
    for index in range(2):
        summary = BlockResult.load(tmp_path / "run" / "blocks" / f"00{index}.safetensors").summary
        for key in ("input_layernorm", "post_attention_layernorm", "v_proj", "up_proj"):
            assert summary[f"AWQ.{key}/recon_error.last"] <= summary[f"AWQ.{key}/recon_error.first"]
            assert summary[f"AWQ.{key}/alpha.first"] == 0
            assert summary[f"AWQ.{key}/alpha.last"] in (0, 0.25, 0.5, 0.75, 1)
        assert any(summary[f"AWQ.{key}/alpha.last"] for key in ("input_layernorm", "v_proj", "up_proj"))


def test_awq_equivalences_default_to_family(tmp_path: Path) -> None:
    assert AWQ().kinds(tiny_layout("llama")) == ["norm", "value_output", "up_down"]
    assert AWQ().kinds(tiny_layout("opt")) == ["norm", "value_output", "up_down"]
    assert AWQ().kinds(tiny_layout("olmo2")) == ["value_output", "up_down"]
    task = outlier_task("llama", 4, A16)
    weights = {name: task.linear(name).weight.clone() for name in task.layout.linears}
    fitted(AWQ(equivalences=["up_down"]), task, tmp_path)
    moved = [name for name, weight in weights.items() if not torch.equal(weight, task.linear(name).weight)]
    assert moved == ["mlp.up_proj", "mlp.down_proj"]


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"candidates": 1}, "AWQ.candidates 1 is too small: give 2 or more"),
        (
            {"equivalences": []},
            "AWQ.equivalences: an empty list is not accepted: choose from norm, value_output, up_down",
        ),
        (
            {"equivalences": ["norm", "norm"]},
            "stages: AWQ.equivalences: 'norm' is given more than once: give each kind once",
        ),
        (
            {"equivalences": ["query_key"]},
            "AWQ.equivalences: 'query_key' is not accepted: choose from norm, value_output",
        ),
    ],
)
def test_awq_invalid_settings_are_refused(options: dict[str, Any], words: str) -> None:
    with pytest.raises(UserError, match=words):
        AWQ(**options)


def test_awq_family_without_equivalence_is_refused() -> None:
    with pytest.raises(UserError, match="stages: AWQ.equivalences: falcon has no equivalence 'norm': use a method"):
        AWQ().check_layout(Layout("falcon", (("mlp.dense",),), Heads(1, 1)))
    with pytest.raises(
        UserError, match="olmo2 has no equivalence 'norm': choose from value_output, query_key, up_down"
    ):
        AWQ(equivalences=["norm"]).check_layout(tiny_layout("olmo2"))
    AWQ().check_layout(tiny_layout("opt"))
