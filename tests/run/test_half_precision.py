# SPDX-License-Identifier: Apache-2.0
"""Learning in float16 on a block with massive activations, as in large models, stays finite.

The published code overflows at 8 bits, where steps are small. Here one token of each sample carries values of thousands
into the block, and one channel of the MLP makes more of them. The Trainer's own float16 needs a GPU; its plugin with a
gradient scaler for the CPU does not. Layer-wise stages compute in float32 all the same.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch.plugins import MixedPrecision

from omniq.blocks.forward import call_block
from omniq.calibration.stage import Stage
from omniq.calibration.task import BlockTask
from omniq.grid.affine import Grid
from omniq.grid.scheme import Activations
from omniq.models.families import family_of_type
from omniq.quantizers.clipping import Searched
from omniq.stages import AWQ, GPTQ, RTN, QuantEase, SpQR
from omniq.stages.omniquant import OmniQuant
from omniq.transforms.let import LET
from tests.helpers.stages import fitted, losses
from tests.helpers.tiny import tiny_block

SIZES: dict[str, Any] = {"hidden_size": 32, "num_attention_heads": 2}
OWN: dict[str, dict[str, Any]] = {"opt": {"ffn_dim": 48, "word_embed_proj_dim": 32}}
ROTARY = {"intermediate_size": 48, "num_key_value_heads": 1}


def massive_task(family: str, bits: int, static: bool, dtype: torch.dtype) -> BlockTask:
    block, kwargs = tiny_block(family, length=12, **SIZES, **OWN.get(family, ROTARY))
    inputs = torch.randn(3, 12, 32, generator=torch.Generator().manual_seed(1))
    inputs[:, 0, 3], inputs[:, 0, 9] = 3000.0, -2100.0
    with torch.no_grad():
        for name in ("fc1",) if family == "opt" else ("mlp.gate_proj", "mlp.up_proj"):
            block.get_submodule(name).weight[5] *= 15
        targets = call_block(block, inputs, kwargs)
    assert targets.abs().max() > 2900
    turned = {"position_embeddings": tuple(part.to(dtype) for part in kwargs.get("position_embeddings", ()))}
    kwargs = {**kwargs, **(turned if "position_embeddings" in kwargs else {})}
    given = Activations(bits, bits, bits, static=static)
    layout = family_of_type(family).layout(block, 0)
    grids = dict.fromkeys(layout.linears, Grid(bits))
    return BlockTask(0, layout, block.to(dtype), grids, inputs.to(dtype), targets.to(dtype), kwargs, activations=given)


def test_omniquant_targets_near_float16_maximum_have_finite_mean() -> None:
    task = massive_task("llama", 4, False, torch.float16)
    task.inputs[:, 0, 3], task.targets[:, 0, 3] = 40000.0, 41000.0
    module = OmniQuant(augmented_loss=True).module(task)
    assert module.targets.isfinite().all()
    assert (module.targets[:, 0, 3] - 40500).abs().max() < 500


@pytest.mark.parametrize("static", [False, True], ids=["token", "tensor"])
@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("precision", ["16-mixed", "bf16-mixed"])
@pytest.mark.parametrize("family", ["llama", "qwen3", "opt"])
def test_omniquant_massive_activations_in_half_precision_stay_finite(
    family: str, precision: Any, bits: int, static: bool, tmp_path: Path
) -> None:
    half = precision == "16-mixed"
    scaler = torch.amp.GradScaler("cpu") if half else None
    task = massive_task(family, bits, static, torch.float16 if half else torch.bfloat16)
    plugin = MixedPrecision(precision, "cpu", scaler)
    fitted(OmniQuant(epochs=5, transform=LET(), augmented_loss=True), task, tmp_path, plugins=[plugin])
    assert torch.tensor(losses(tmp_path)).isfinite().all()
    assert "guard" not in task.notes
    assert scaler is None or scaler.get_scale() >= 1  # measured 32 to 65536: steps were taken
    assert task.result is not None
    assert all(value.isfinite().all() for _, value in task.result.dequantized())


STAGES: dict[str, tuple[Callable[[], Stage], ...]] = {
    "GPTQ": (GPTQ,),
    "QuantEase": (lambda: QuantEase(sweeps=4),),
    "from GPTQ": (lambda: QuantEase(sweeps=4, start="gptq", token_weights="relative", refit_scales=True),),
    "Algorithm 3": (lambda: QuantEase(sweeps=4, outliers=3, outlier_method="algorithm3"),),
    "on a grid": (lambda: RTN(clipping=Searched("gram")), lambda: QuantEase(sweeps=4)),
    "SpQR": (SpQR,),
    "AWQ": (lambda: AWQ(candidates=4),),
    "RTN": (lambda: RTN(clipping=Searched("gram")),),
}


@pytest.mark.parametrize("precision", ["16-mixed", "bf16-mixed"])
@pytest.mark.parametrize("family", ["llama", "opt"])
@pytest.mark.parametrize("stages", STAGES.values(), ids=STAGES.keys())
def test_layerwise_stage_under_mixed_precision_gives_same_codes(
    stages: tuple[Callable[[], Stage], ...], family: str, precision: Any, tmp_path: Path
) -> None:
    """The Trainer's precision applies to the block only; codes and errors stay the same."""
    half = precision == "16-mixed"
    found = []
    for mixed in (False, True):
        task = massive_task(family, 3, False, torch.float16 if half else torch.bfloat16)
        task.activations = Activations()
        plugin = MixedPrecision(precision, "cpu", torch.amp.GradScaler("cpu") if half else None)
        task.precision = plugin.forward_context if mixed else task.precision
        for number, stage in enumerate(stages):
            folder = tmp_path / f"{mixed}{number}"
            fitted(stage(), task, folder, plugins=[plugin] if mixed else [])
        assert task.result is not None
        assert "guard" not in task.notes
        found.append((task.result.linears, (folder / "losses.csv").read_text()))
    (plain, errors), (mixed_, mixed_errors) = found
    assert errors == mixed_errors
    for name, linear in plain.items():
        for part in ("codes", "scale", "zero_point"):
            assert torch.equal(getattr(linear, part), getattr(mixed_[name], part)), (name, part)
