# SPDX-License-Identifier: Apache-2.0
"""Fixed ranges of inputs: how they are measured, stored, exported and used by a runtime."""

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from omniq.blocks.activation_hooks import Finished, quantized_activations
from omniq.blocks.forward import call_block
from omniq.calibration.rounding import round_to_nearest
from omniq.calibration.static_ranges import calibrate_static_ranges
from omniq.calibration.task import BlockTask
from omniq.cli.command import main
from omniq.errors import UserError
from omniq.export import VerificationError
from omniq.grid.affine import Grid
from omniq.grid.scheme import Activations
from omniq.models.layout import Layout
from omniq.models.source import SourceModel
from omniq.quantizers.activations import StaticGrid, quantize_tokens
from omniq.storage.block_result import BlockResult, QuantizedLinear
from tests.helpers.exported import WINDOWS, export, rounded, verify
from tests.helpers.runs import omniquant, outcome, write_run
from tests.helpers.schemes import scheme_of
from tests.helpers.tiny import tiny_block, tiny_layout

FAMILIES = ["llama", "qwen3", "opt"]
X = torch.randn(6, 16, 64, generator=torch.Generator().manual_seed(0))


def inputs_before_and_after(
    block: nn.Module, layout: Layout, kwargs: dict[str, Any], given: Activations, finished: Finished | None
) -> list[tuple[Tensor, Tensor]]:
    """What comes to every linear of a block, and what the quantizers make of it."""
    before: list[Tensor] = []
    after: list[Tensor] = []
    linears = [block.get_submodule(name) for name in layout.linears]
    handles = [each.register_forward_pre_hook(lambda module, args: before.append(args[0])) for each in linears]
    with torch.no_grad(), quantized_activations(block, layout, given, finished):
        handles += [each.register_forward_pre_hook(lambda module, args: after.append(args[0])) for each in linears]
        call_block(block, X, kwargs)
    for handle in handles:
        handle.remove()
    return list(zip(before, after, strict=True))


def finished_with(layout: Layout, fixed: StaticGrid) -> Finished:
    nothing = torch.zeros(1, 1)
    return dict.fromkeys(layout.linears, QuantizedLinear(Grid(4), nothing, nothing, nothing, input=fixed))


@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("family", FAMILIES)
def test_static_activations_quantize_all_tokens_on_shared_range(family: str, symmetric: bool) -> None:
    """Calibration uses the range of the sample, a finished block its fixed range; kept linears are not quantized.

    OPT passes the tokens of a whole batch as rows of one matrix; the range is the same there.
    """
    block, kwargs = tiny_block(family)
    form, given = tiny_layout(family), Activations(6, symmetric=symmetric, static=True)
    fixed = StaticGrid.fit(torch.tensor(-0.9), torch.tensor(1.7), 6, symmetric, torch.float16)

    def check(finished: Finished | None, quantize: Any) -> None:
        pairs = inputs_before_and_after(block, form, kwargs, given, finished)
        assert len(pairs) == len(form.linears)
        assert all(torch.equal(after, quantize(before)) for before, after in pairs)

    check(None, lambda x: quantize_tokens(x.reshape(len(X), -1), 6, symmetric).view(x.shape))
    check(finished_with(form, fixed), lambda x: fixed.quantize(x, 6))
    check({}, lambda x: x)


@pytest.mark.parametrize("family", FAMILIES)
def test_calibrate_static_ranges_measures_deployed_block(family: str) -> None:
    """The reference is measured with hooks of this test on a block with rounded weights."""
    block, kwargs = tiny_block(family)
    form, given, grid = tiny_layout(family), Activations(8, static=True), Grid(4, scale_dtype=torch.float32)
    task = BlockTask(0, form, block, dict.fromkeys(form.linears, grid), X, X, kwargs, activations=given)
    linears = {name: round_to_nearest(task.linear(name).weight, grid) for name in form.linears}
    result = calibrate_static_ranges(task, BlockResult(linears, task.plain_tensors()))
    seen = inputs_before_and_after(block, form, kwargs, Activations(), None)  # with the deployed weights by now
    for (raw, _), name in zip(seen, form.linears, strict=True):
        found = result.linears[name].input
        assert found is not None
        lo, hi = min(float(raw.min()), 0.0), max(float(raw.max()), 0.0)
        assert found.scale.item() == pytest.approx((hi - lo) / 255, rel=1e-5)
        assert found.zero_point.item() == round(-128 - lo / found.scale.item())


def test_calibrate_static_ranges_with_infinite_input_is_refused() -> None:
    """Otherwise the scale would be the largest possible one, and nearly all inputs would silently become zero."""
    block, kwargs = tiny_block("llama")
    form, given, grid = tiny_layout("llama"), Activations(8, static=True), Grid(8)
    task = BlockTask(0, form, block, dict.fromkeys(form.linears, grid), X, X, kwargs, activations=given)
    block.get_submodule("mlp.down_proj").register_forward_pre_hook(
        lambda module, args: (args[0].masked_fill(args[0] == args[0].max(), torch.inf),), prepend=True
    )
    linears = {name: round_to_nearest(task.linear(name).weight, grid) for name in form.linears}
    with pytest.raises(
        UserError, match=r"block/000 mlp.down_proj: the range of its inputs is not finite because \d of 6"
    ):
        calibrate_static_ranges(task, BlockResult(linears, task.plain_tensors()))


def test_static_ranges_saved_are_read_back(tmp_path: Path) -> None:
    fixed = StaticGrid(torch.tensor([0.25], dtype=torch.float16), torch.tensor([-7], dtype=torch.int8))
    linear = round_to_nearest(torch.randn(4, 32), Grid(4))
    result = BlockResult({"a": linear, "b": linear}, {}).with_inputs({"a": fixed, "b": fixed})
    result.save(tmp_path / "block")
    for found in (
        *BlockResult.load(tmp_path / "block").linears.values(),
        QuantizedLinear.from_state(result.linears["a"].to_state()),
    ):
        assert found.input is not None
        assert (found.input.scale, found.input.zero_point) == (fixed.scale, fixed.zero_point)
        assert (found.input.scale.dtype, found.input.zero_point.dtype) == (torch.float16, torch.int8)


@pytest.mark.parametrize("symmetric", [False, True])
def test_exported_static_ranges_are_used_by_transformers(
    symmetric: bool, source: SourceModel, results: list[BlockResult], tmp_path: Path
) -> None:
    def fixed(results: list[BlockResult], hi: float) -> list[BlockResult]:
        bounds = torch.tensor(-2.0), torch.tensor(hi)
        return [
            result.with_inputs({name: StaticGrid.fit(*bounds, 8, symmetric, torch.float16) for name in result.linears})
            for result in results
        ]

    scheme = scheme_of(Grid(4, 32), 8, activation_symmetric=symmetric, activation_range="tensor")
    with pytest.raises(ValueError, match="q_proj: the range of its input is missing, although the scheme fixes it"):
        export(source, results, tmp_path / "out", scheme=scheme)
    results = fixed(results, 3.0)
    out = export(source, results, tmp_path / "out", scheme=scheme)
    stored = load_file(out / "model.safetensors")
    assert ("model.layers.1.mlp.up_proj.input_zero_point" in stored) != symmetric
    assert verify(out, source, results, scheme=scheme, windows=WINDOWS, tolerance=0.0).windows == 2
    with pytest.raises(VerificationError, match=r"layers\.0\.self_attn\.q_proj: scale of input differ first at \[0\]"):
        verify(out, source, fixed(results, 3.1), scheme=scheme)
    with pytest.raises(VerificationError, match="q_proj: the range of its input is in the file only"):
        verify(out, source, rounded(source, Grid(4, 32)), scheme=scheme)


def test_quantize_with_static_ranges_keeps_and_exports_ranges_of_last_stage(tmp_path: Path) -> None:
    """A resumed run reads the ranges. The MLP of OPT receives tokens without a batch dimension."""
    stages = [omniquant(transform={}), {"class_path": "omniq.stages.GPTQ"}]
    scheme = {"name": "W8A8", "activation_range": "tensor"}
    command = write_run(tmp_path, "opt", scheme=scheme, stages=stages)
    assert main(command) == 0
    run = tmp_path / "run"
    whole, first = outcome(run), BlockResult.load(run / "blocks" / "000.safetensors")
    stored = load_file(run / "model" / "model.safetensors")
    for group in tiny_layout("opt").groups:
        grids = {name: first.linears[name].input for name in group}
        assert len({float(grid.scale) for grid in grids.values() if grid is not None}) == 1
        for name, grid in grids.items():
            assert grid is not None
            assert torch.equal(stored[f"model.decoder.layers.0.{name}.input_scale"], grid.scale)
    for gone in ("blocks/001.safetensors", "summary.json", "perplexity.json"):
        (run / gone).unlink()
    shutil.rmtree(run / "model")
    assert main(command) == 0
    assert outcome(run) == whole


@pytest.mark.parametrize("stage", ["SmoothQuant", "OutlierSuppression", "QuantEase"])
def test_stage_with_static_ranges_exports_and_verifies(stage: str, tmp_path: Path) -> None:
    scheme = {"name": "W4A8", "activation_range": "tensor"}
    stages = [{"class_path": f"omniq.stages.{stage}"}]
    assert main(write_run(tmp_path, scheme=scheme, stages=stages, evaluation=None)) == 0


def test_omniquant_with_static_ranges_lowers_loss(tmp_path: Path) -> None:
    stages = [omniquant(epochs=8, transform={})]
    scheme = {"name": "W3A6", "activation_range": "tensor"}
    assert main(write_run(tmp_path, scheme=scheme, stages=stages, export={"format": "none"}, evaluation=None)) == 0
    summary = BlockResult.load(tmp_path / "run" / "blocks" / "000.safetensors").summary
    assert summary["OmniQuant.loss.last"] < 0.9 * summary["OmniQuant.loss.first"]
