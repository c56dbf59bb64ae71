# SPDX-License-Identifier: Apache-2.0
"""SmoothQuant and Outlier Suppression+: exact in full precision, better than rounding alone, composable."""

from pathlib import Path
from typing import Any

import pytest
import torch
from stages import fitted
from test_let import relative, task_of
from torch import Tensor

from omniq.errors import UserError
from omniq.models.family import Family
from omniq.quantizers.activations import quantize_tokens
from omniq.quantizers.clipping import Searched
from omniq.quantizers.scheme import Activations
from omniq.result import deploy
from omniq.stages import GPTQ, RTN, OutlierSuppression, SmoothQuant
from omniq.stages.base import BlockTask, Stage
from omniq.stages.rtn import round_to_nearest

A4 = Activations(4)


def deployed_error(stages: list[Stage], task: BlockTask, folder: Path) -> float:
    """Relative error of the block's output after these stages, activations quantized."""
    for number, stage in enumerate(stages):
        (folder / str(number)).mkdir(parents=True)
        fitted(stage, task, folder / str(number))
    assert task.result is not None
    deploy(task.block, task.result)
    with task.quantized_activations():
        return relative(task.run(task.inputs), task.targets)


@pytest.mark.parametrize("family", ["llama", "qwen3", "opt"])
@pytest.mark.parametrize("stage", [SmoothQuant(), SmoothQuant(0.8, ("norm", "value_output")), OutlierSuppression()])
def test_block_stays_what_it_was_and_quantizes_better(family: str, stage: Stage, tmp_path: Path) -> None:
    plain = deployed_error([RTN()], task_of(family, 4, A4), tmp_path / "plain")
    task = task_of(family, 4, A4)
    (tmp_path / "one").mkdir()
    fitted(stage, task, tmp_path / "one")
    assert relative(task.run(task.inputs), task.targets) < 2e-6  # measured 4e-7
    smoothed = deployed_error([stage], task_of(family, 4, A4), tmp_path / "smoothed")
    assert smoothed < 0.9 * plain


def test_codes_are_those_of_the_smoothed_block(tmp_path: Path) -> None:
    task = task_of("llama", 4, A4)
    fitted(SmoothQuant(), task, tmp_path)
    assert task.result is not None
    for name, linear in task.result.linears.items():
        expected = round_to_nearest(task.linear(name).weight, task.grid)
        assert torch.equal(linear.codes, expected.codes)
        assert torch.equal(linear.scale, expected.scale)
    for name, tensor in task.result.tensors.items():
        assert torch.equal(tensor, task.block.get_parameter(name))


def test_they_compose_before_other_stages(tmp_path: Path) -> None:
    alone = deployed_error([RTN(Searched())], task_of("llama", 3, A4), tmp_path / "alone")
    then_rtn = deployed_error([SmoothQuant(), RTN(Searched())], task_of("llama", 3, A4), tmp_path / "rtn")
    then_gptq = deployed_error([OutlierSuppression(), GPTQ()], task_of("llama", 3, A4), tmp_path / "gptq")
    assert then_rtn < alone
    assert then_gptq < alone


def test_threshold_is_the_best_of_all_candidates(tmp_path: Path) -> None:
    """Against a search written out for the norm before the MLP of an OPT block."""
    task = task_of("opt", 4, A4)
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
        rounded = round_to_nearest(weight * scale, task.grid).dequantize()
        losses.append(float((quantize_tokens(x / scale, 4) @ rounded.T - x @ weight.T).square().sum()))
        scales.append(scale)
    fitted(OutlierSuppression(candidates=10), task, tmp_path)
    torch.testing.assert_close(before / norm.weight, scales[losses.index(min(losses))], rtol=1e-5, atol=0)
    torch.testing.assert_close(task.linear("fc1").bias, bias + weight @ middle, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: SmoothQuant(alpha=2.0), "alpha 2.0 is outside 0..1"),
        (lambda: SmoothQuant(equivalences=["mlp"]), "'mlp' is not usable, choose from norm, value_output, query_key"),
        (lambda: OutlierSuppression(candidates=0), "OutlierSuppression.candidates 0 is too small: give 1 or more"),
        (lambda: OutlierSuppression(samples=0), "OutlierSuppression.samples 0 is too small: give 1 or more"),
    ],
)
def test_bad_settings(make: Any, words: str) -> None:
    with pytest.raises(UserError, match=words):
        make()


@pytest.mark.parametrize("stage", [SmoothQuant(), OutlierSuppression()])
def test_families_without_norms_to_move_are_refused(stage: Stage) -> None:
    with pytest.raises(UserError, match="falcon has no 'norm'; it has none"):
        stage.check_family(Family(("falcon",), "transformer.h", (("mlp.dense",),)))
