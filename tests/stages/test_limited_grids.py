# SPDX-License-Identifier: Apache-2.0
"""Every stage obeys limits of zero points and of scales, and a saved result keeps them for the next stage."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from omniq.calibration.stage import Stage
from omniq.calibration.task import BlockTask
from omniq.export.formats.codec import WrittenLinear
from omniq.export.formats.gptq import Gptq
from omniq.grid.affine import Grid
from omniq.grid.scheme import Scheme
from omniq.quantizers.absolute import LSQ, PACT
from omniq.quantizers.clipping import Searched
from omniq.stages import AWQ, GPTQ, RTN, LearnedRounding, OmniQuant, OutlierSuppression, QuantEase, SmoothQuant
from omniq.storage.block_result import BlockResult, QuantizedLinear
from omniq.transforms.let import LET
from tests.helpers.stages import fitted, tiny_task

STAGES: dict[str, Callable[[], list[Stage]]] = {
    "RTN": lambda: [RTN()],
    "RTN searched": lambda: [RTN(clipping=Searched())],
    "GPTQ": lambda: [GPTQ(act_order=True)],
    "AWQ": lambda: [AWQ(candidates=5)],
    "SmoothQuant": lambda: [SmoothQuant()],
    "OutlierSuppression": lambda: [OutlierSuppression(candidates=4, samples=2)],
    "QuantEase": lambda: [QuantEase(sweeps=4, refit_scales=True)],
    "LearnedRounding": lambda: [RTN(), LearnedRounding(epochs=2, norm_lr=1e-3)],
    "OmniQuant": lambda: [OmniQuant(epochs=2)],
    "OmniQuant with LET": lambda: [OmniQuant(epochs=2, transform=LET())],
    "PACT": lambda: [OmniQuant(epochs=2, clipping=PACT())],
    "LSQ": lambda: [OmniQuant(epochs=2, clipping=LSQ())],
    "OmniQuant then QuantEase": lambda: [OmniQuant(epochs=2), QuantEase(sweeps=4)],
}
LIMITED = Grid(2, 16, scale_dtype=torch.float32, zero_points="inner", scale_bits=8)


def result_of(stages: list[Stage], grid: Grid, folder: Path) -> dict[str, QuantizedLinear]:
    """The linears after all stages; the weights of the first two outputs of each linear have one sign."""
    task: BlockTask = tiny_task(grid)
    with torch.no_grad():
        for name in task.layout.linears:
            weight = task.linear(name).weight
            weight[0], weight[1] = weight[0].abs(), -weight[1].abs()
    folder.mkdir(exist_ok=True)
    for number, stage in enumerate(stages):
        fitted(stage, task, folder / str(number))
    assert task.result is not None
    return dict(task.result.linears)


@pytest.mark.parametrize("label", STAGES)
def test_stage_obeys_limits_of_grid(label: str, tmp_path: Path) -> None:
    for name, linear in result_of(STAGES[label](), LIMITED, tmp_path).items():
        assert set(linear.zero_point.unique().tolist()) <= {1, 2}, name
        assert torch.equal(linear.scale.bfloat16().float(), linear.scale), name
        assert (linear.grid.zero_points, linear.grid.scale_bits) == ("inner", 8)


def test_stage_without_limits_uses_all_zero_points(tmp_path: Path) -> None:
    """Otherwise the test above could not fail."""
    linears = result_of([RTN()], Grid(2, 16, scale_dtype=torch.float32), tmp_path)
    zero_points = {value for linear in linears.values() for value in linear.zero_point.unique().tolist()}
    assert zero_points == {0, 1, 2, 3}
    assert not all(torch.equal(linear.scale.bfloat16().float(), linear.scale) for linear in linears.values())


def test_saved_result_keeps_limits(tmp_path: Path) -> None:
    result = BlockResult(result_of([RTN()], LIMITED, tmp_path), {})
    result.save(tmp_path / "block")
    for linear in BlockResult.load(tmp_path / "block").linears.values():
        assert (linear.grid.zero_points, linear.grid.scale_bits) == ("inner", 8)
    plain = BlockResult(result_of([RTN()], Grid(2, 16), tmp_path / "plain"), {})
    plain.save(tmp_path / "plain_block")
    assert b"zero_points" not in (tmp_path / "plain_block").read_bytes()  # as in files of earlier versions


def test_gptq_format_uses_version_1_for_nonzero_zero_points(tmp_path: Path) -> None:
    scheme = Scheme("W2A16g16", zero_points="nonzero")
    linear = result_of([RTN()], scheme.grid, tmp_path)["mlp.up_proj"]
    codec = Gptq(scheme)
    codec.check_linear("x", linear)
    stored = codec.store("x", linear)
    config = codec.quantization_config({"blocks.0.x": WrittenLinear.of(linear)}, [])
    assert config["checkpoint_format"] == "gptq"
    found = codec.load("x", stored, codec.grid_of("x", config, torch.float16))
    assert torch.equal(found.zero_point, linear.zero_point)
    wrong = QuantizedLinear(scheme.grid, linear.codes, linear.scale, torch.zeros_like(linear.zero_point))
    with pytest.raises(ValueError, match="x: a zero point is 0, although the scheme excludes it"):
        codec.check_linear("x", wrong)
