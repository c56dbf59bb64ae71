# SPDX-License-Identifier: Apache-2.0
"""SmoothQuant and Outlier Suppression+ keep the output in full precision and lower the quantized error."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from omniq.calibration.rounding import round_to_nearest
from omniq.calibration.stage import Stage
from omniq.errors import UserError
from omniq.grid.affine import Grid, rounded_to_nearest
from omniq.grid.scheme import Activations
from omniq.models.layout import Layout
from omniq.quantizers.activations import quantize_tokens
from omniq.quantizers.clipping import Searched
from omniq.stages import GPTQ, RTN, OmniQuant, OutlierSuppression, SmoothQuant
from omniq.storage.block_result import QuantizedLinear
from omniq.transforms.heads import Heads
from omniq.transforms.let import LET
from tests.helpers.outlier_task import deployed_error, outlier_task, relative
from tests.helpers.stages import fitted

A4 = Activations(4)


@pytest.mark.parametrize("family", ["llama", "qwen3", "opt"])
@pytest.mark.parametrize("stage", [SmoothQuant(), SmoothQuant(0.8, ("norm", "value_output")), OutlierSuppression()])
def test_smoothing_keeps_block_output_and_lowers_error(family: str, stage: Stage, tmp_path: Path) -> None:
    plain = deployed_error([RTN()], outlier_task(family, 4, A4), tmp_path / "plain")
    task = outlier_task(family, 4, A4)
    (tmp_path / "one").mkdir()
    fitted(stage, task, tmp_path / "one")
    assert relative(task.run(task.inputs), task.targets) < 2e-6  # measured 4e-7
    smoothed = deployed_error([stage], outlier_task(family, 4, A4), tmp_path / "smoothed")
    assert smoothed < 0.9 * plain


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
@pytest.mark.parametrize("grid", [Grid(4), Grid(3, 16), Grid(8, 16, symmetric=True)])
def test_rounded_to_nearest_equals_dequantized_codes(grid: Grid, device: str) -> None:
    weight = torch.randn(24, 48, generator=torch.Generator().manual_seed(0)).to(device)
    weight[3] = 0.0
    rounded = rounded_to_nearest(weight, grid)
    assert rounded.device == weight.device
    assert torch.equal(rounded.cpu(), round_to_nearest(weight, grid).dequantize())


def test_outlier_suppression_search_makes_no_codes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Codes are made on the host: each candidate would move the weight from the GPU and back."""
    made, of = [], QuantizedLinear.of
    monkeypatch.setattr(QuantizedLinear, "of", lambda *args: made.append(args) or of(*args))
    task = outlier_task("llama", 4, A4)
    fitted(OutlierSuppression(candidates=3), task, tmp_path)
    assert len(made) == len(task.layout.linears)


def test_smoothquant_codes_are_those_of_smoothed_block(tmp_path: Path) -> None:
    task = outlier_task("llama", 4, A4)
    fitted(SmoothQuant(), task, tmp_path)
    assert task.result is not None
    for name, linear in task.result.linears.items():
        expected = round_to_nearest(task.linear(name).weight, task.grids[name])
        assert torch.equal(linear.codes, expected.codes)
        assert torch.equal(linear.scale, expected.scale)
    for name, tensor in task.result.tensors.items():
        assert torch.equal(tensor, task.block.get_parameter(name))


def test_smoothing_before_other_stages_lowers_error(tmp_path: Path) -> None:
    alone = deployed_error([RTN(Searched())], outlier_task("llama", 3, A4), tmp_path / "alone")
    then_rtn = deployed_error([SmoothQuant(), RTN(Searched())], outlier_task("llama", 3, A4), tmp_path / "rtn")
    then_gptq = deployed_error([OutlierSuppression(), GPTQ()], outlier_task("llama", 3, A4), tmp_path / "gptq")
    assert then_rtn < alone
    assert then_gptq < alone


def test_outlier_suppression_threshold_is_best_candidate(tmp_path: Path) -> None:
    """The reference is a search written out for the norm before the MLP of an OPT block."""
    task = outlier_task("opt", 4, A4)
    weight, bias = task.linear("fc1").weight.clone(), task.linear("fc1").bias.clone()
    norm = task.block.get_submodule("final_layer_norm")
    before = norm.weight.clone()
    seen: list[Tensor] = []
    handle = task.linear("fc1").register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    task.run(task.inputs)
    handle.remove()
    x = torch.cat([part.reshape(-1, 32) for part in seen])
    middle = (x.amax(0) + x.amin(0)) / 2
    x = x - middle
    size = x.abs().amax(0)
    losses, scales = [], []
    for step in range(10):
        scale = (size / (size.max() * (1 - step / 10))).clamp(min=1)
        rounded = round_to_nearest(weight * scale, task.grids["fc1"]).dequantize()
        losses.append(float((quantize_tokens(x / scale, 4) @ rounded.T - x @ weight.T).square().sum()))
        scales.append(scale)
    fitted(OutlierSuppression(candidates=10), task, tmp_path)
    assert 0 < losses.index(min(losses)) < 9
    torch.testing.assert_close(before / norm.weight, scales[losses.index(min(losses))], rtol=1e-5, atol=0)
    torch.testing.assert_close(task.linear("fc1").bias, bias + weight @ middle, rtol=1e-5, atol=1e-5)


def test_outlier_suppression_readers_of_kv_head_share_threshold(tmp_path: Path) -> None:
    """The reference is the same search for ``o_proj`` of LLaMA: 4 query heads of 8 channels, 2 KV heads."""
    task = outlier_task("llama", 4, A4, num_attention_heads=4, num_key_value_heads=2)
    output, seen = task.linear("self_attn.o_proj"), []
    task.linear("self_attn.v_proj").weight[[3, 6, 12]] *= 9.0
    weight = output.weight.clone()
    handle = output.register_forward_pre_hook(lambda module, args: seen.append(args[0].flatten(0, -2)))
    task.run(task.inputs)
    handle.remove()

    def wide(of_keys: Tensor) -> Tensor:
        """What belongs to channels of KV heads, ``[2, 8]``, for the query heads 0 and 1 of the first, 2 and 3 ..."""
        return of_keys[[0, 0, 1, 1]].flatten()

    x = torch.cat(seen)
    lo, hi = x.amin(0).view(2, 2, 8).amin(1), x.amax(0).view(2, 2, 8).amax(1)
    x = x - wide((lo + hi) / 2)
    size = x.abs().amax(0).view(2, 2, 8).amax(1)
    losses, scales = [], []
    for step in range(10):
        scale = wide((size / (size.max() * (1 - step / 10))).clamp(min=1))
        rounded = round_to_nearest(weight * scale, task.grids["self_attn.o_proj"]).dequantize()
        losses.append(float((quantize_tokens(x / scale, 4) @ rounded.T - x @ weight.T).square().sum()))
        scales.append(scale)
    fitted(OutlierSuppression(candidates=10), task, tmp_path)
    assert 0 < losses.index(min(losses)) < 9
    torch.testing.assert_close(output.weight / weight, scales[losses.index(min(losses))].expand(32, -1))


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: SmoothQuant(alpha=2.0), "alpha 2.0 is outside 0 to 1"),
        (
            lambda: SmoothQuant(equivalences=["mlp"]),
            "stages: SmoothQuant.equivalences: 'mlp' is not accepted: choose from norm, value_output, up_down",
        ),
        (
            lambda: SmoothQuant(equivalences=["norm", "query_key"]),
            "SmoothQuant.equivalences: 'query_key' is not usable",
        ),
        (lambda: OutlierSuppression(candidates=0), "OutlierSuppression.candidates 0 is too small: give 1 or more"),
        (lambda: OutlierSuppression(samples=0), "OutlierSuppression.samples 0 is too small: give 1 or more"),
    ],
)
def test_smoothing_invalid_settings_are_refused(make: Any, words: str) -> None:
    with pytest.raises(UserError, match=words):
        make()


@pytest.mark.parametrize("stage", [SmoothQuant(), OutlierSuppression(), OmniQuant(transform=LET())])
@pytest.mark.parametrize("value", [torch.inf, torch.nan])
def test_smoothing_nonfinite_inputs_are_refused(value: float, stage: Stage, tmp_path: Path) -> None:
    """The stage refuses them before it makes scales of them, so the block is unchanged."""
    task = outlier_task("opt", 4, A4)
    task.inputs[1, 5, 3] = value
    told = r"block/000 self_attn.q_proj: the range of its inputs is not finite, 1 of 3 samples have .*; use trainer"
    with pytest.raises(UserError, match=told):
        fitted(stage, task, tmp_path)
    assert all(parameter.isfinite().all() for parameter in task.block.parameters())


@pytest.mark.parametrize("stage", [SmoothQuant(), OutlierSuppression()])
def test_smoothing_family_without_norms_is_refused(stage: Stage) -> None:
    field = "SmoothQuant.equivalences" if isinstance(stage, SmoothQuant) else "OutlierSuppression"
    with pytest.raises(UserError, match=f"stages: {field}: falcon has no equivalence 'norm': use a method"):
        stage.check_layout(Layout("falcon", (("mlp.dense",),), Heads(1, 1)))
