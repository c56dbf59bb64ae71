# SPDX-License-Identifier: Apache-2.0
"""Shared parts of the layer-wise stages: sums of Gram matrices, refused inputs, warnings and logged errors."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from omniq.calibration.gram import GramModule
from omniq.calibration.input_statistics import gram_of, power_of
from omniq.calibration.loader import PlanLoader
from omniq.calibration.observe import Observation
from omniq.calibration.stage import Stage
from omniq.errors import UserError
from omniq.grid.affine import Grid
from omniq.kernels.matmul_precision import matmul_precision
from omniq.quantizers.clipping import LWC, Searched
from omniq.solvers import alternating_descent
from omniq.solvers import gptq as gptq_kernel
from omniq.solvers import spqr as spqr_kernel
from omniq.stages import AWQ, GPTQ, RTN, OmniQuant, QuantEase, SpQR
from omniq.storage.block_result import QuantizedLinear
from tests.helpers.stages import fitted, on_cuda, tiny_task

GRID = Grid(3, 16)
LAYER_WISE: dict[str, Callable[[], Stage]] = {
    "GPTQ": GPTQ,
    "QuantEase": lambda: QuantEase(sweeps=4),
    "from GPTQ": lambda: QuantEase(sweeps=4, start="gptq", refit_scales=True),
    "Algorithm 3": lambda: QuantEase(sweeps=4, outliers=5, outlier_method="algorithm3"),
    "SpQR": SpQR,
}
layer_wise = pytest.mark.parametrize("stage", LAYER_WISE.values(), ids=LAYER_WISE.keys())


def logged(folder: Path) -> dict[str, list[float]]:
    """The values of a fit by name."""
    found: dict[str, list[float]] = {}
    for row in (folder / "losses.csv").read_text().splitlines()[1:]:
        *_, name, value = row.split(",")
        found.setdefault(name, []).append(float(value))
    return found


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_gram_of_half_inputs_accumulates_in_float32(dtype: torch.dtype) -> None:
    x = (100 * torch.randn(50, 7, generator=torch.Generator().manual_seed(0))).to(dtype)
    gram = gram_of(x)
    reference = x.double().t() @ x.double()
    assert gram.dtype == torch.float32
    assert torch.allclose(gram.double(), reference, rtol=1e-5, atol=1e-5 * reference.abs().max())  # measured 2e-7


@pytest.mark.parametrize(
    "stage",
    [
        *LAYER_WISE.values(),
        lambda: QuantEase(sweeps=1, true_sequential=False),
        AWQ,
        lambda: RTN(clipping=Searched()),
        lambda: RTN(clipping=Searched("gram")),
        lambda: OmniQuant(epochs=1, clipping=LWC(initial=Searched("gram"))),
    ],
)
def test_stage_with_nonfinite_inputs_names_and_counts_them(stage: Callable[[], Stage], tmp_path: Path) -> None:
    task = tiny_task(GRID, samples=6)
    task.inputs[2, 3] = torch.inf
    task.inputs[5] = torch.nan
    with pytest.raises(
        UserError, match=r"block/000 self_attn.q_proj: .* not finite because 2 of 6 samples .*: set .*32-true"
    ):
        fitted(stage(), task, tmp_path)


def test_gptq_with_inputs_too_large_to_square_says_so(tmp_path: Path) -> None:
    task = tiny_task(GRID, samples=6)
    with torch.no_grad():
        task.block.input_layernorm.weight.mul_(1e25)
    with pytest.raises(UserError, match=r"block/000 self_attn.q_proj: .* its inputs are too large to square"):
        fitted(GPTQ(), task, tmp_path)


@layer_wise
@pytest.mark.parametrize("name", ["self_attn.q_proj", "self_attn.v_proj", "mlp.up_proj", "mlp.down_proj"])
def test_gram_stage_with_nonfinite_weights_names_linear(stage: Callable[[], Stage], name: str, tmp_path: Path) -> None:
    for sequential in (True, False):
        task, method = tiny_task(GRID, samples=6), stage()
        vars(method)["true_sequential"] = sequential
        task.linear(name).weight.data[1, :3] = torch.nan
        with pytest.raises(UserError, match=f"block/000 {name}: 3 weights of the model are not finite: use an undam"):
            fitted(method, task, tmp_path / str(sequential))


def test_gptq_with_fewer_tokens_than_inputs_warns(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    fitted(GPTQ(), tiny_task(GRID, samples=1), tmp_path)
    assert "self_attn.q_proj: 12 tokens for 32 inputs" in caplog.text


@layer_wise
@pytest.mark.parametrize("name", ["self_attn.v_proj", "mlp.down_proj"])
def test_gram_stage_with_all_zero_linear_has_finite_result(
    stage: Callable[[], Stage], name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Values of zero also make the inputs of the output projection zero."""
    monkeypatch.setattr(GramModule, "save_interval", 0.0)
    task = tiny_task(GRID, samples=6)
    task.linear(name).weight.data.zero_()
    fitted(stage(), task, tmp_path)
    assert task.result is not None
    assert "guard" not in task.notes
    assert all(value.isfinite().all() for _, value in task.result.dequantized())
    errors = logged(tmp_path)
    assert torch.tensor([value for values in errors.values() for value in values]).isfinite().all()
    assert set(errors[f"{name.partition('.')[2]}/recon_error"]) == {0.0}


@pytest.mark.parametrize("stage", [GPTQ, SpQR], ids=["GPTQ", "SpQR"])
def test_gram_stage_logged_errors_equal_errors_of_result(stage: Callable[[], Stage], tmp_path: Path) -> None:
    task = tiny_task(GRID, samples=6)
    fitted(stage(), task, tmp_path)
    assert task.result is not None
    x = task.inputs.double()
    x = x / (x.square().mean(-1, keepdim=True) + task.block.input_layernorm.variance_epsilon).sqrt()
    x = (x * task.block.input_layernorm.weight.double()).flatten(0, 1)
    for name in ("q_proj", "k_proj", "v_proj"):
        weight = task.linear(f"self_attn.{name}").weight.double()
        missed = weight - task.result.linears[f"self_attn.{name}"].dequantize(torch.float64)
        error = float((x @ missed.t()).square().sum() / (x @ weight.t()).square().sum())
        assert logged(tmp_path)[f"{name}/recon_error"] == [pytest.approx(error, rel=1e-3)]


def test_gptq_gram_matrix_is_summed_in_place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """For 28672 inputs a Gram matrix has 3 GiB, so a third copy beside the sum and the summand is too many."""
    places: dict[str, set[int]] = {}
    run_batch = Observation.run_batch

    def watched(observation: Observation, *args: Any) -> None:
        run_batch(observation, *args)
        for name, counts in observation.counts.items():
            places.setdefault(name, set()).add(counts.totals[0].data_ptr())

    monkeypatch.setattr(Observation, "run_batch", watched)
    fitted(GPTQ(batch_size=1), tiny_task(GRID, samples=6), tmp_path)
    assert [len(found) for found in places.values()] == [1, 1, 1, 1]


@pytest.mark.gpu
def test_gram_stage_on_cuda_dequantizes_on_gpu_and_returns_cpu_result(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On the host, dequantizing takes longer than the descent. Other processes receive tensors of the CPU."""
    devices, dequantize = [], QuantizedLinear.dequantize

    def watched(linear: QuantizedLinear, *args: Any, **options: Any) -> torch.Tensor:
        weight = dequantize(linear, *args, **options)
        devices.append(weight.device.type)
        return weight

    task = on_cuda(tiny_task(GRID, samples=6))
    monkeypatch.setattr(QuantizedLinear, "dequantize", watched)
    for number, stage in enumerate((GPTQ(), QuantEase(sweeps=2, start="previous"))):
        fitted(stage, task, tmp_path / str(number), accelerator="gpu", devices=1)
    assert devices == ["cuda"] * (3 * len(task.layout.linears))
    assert task.result is not None
    assert {tensor.device.type for tensor in task.result.tensors.values()} == {"cpu"}


@pytest.mark.parametrize(("processes", "ends"), [(1, [3, 4, 5, 6, 9, 10, 11, 12]), (2, [3, 6, 9, 12])])
def test_plan_loader_passes_end_where_state_can_be_saved(
    processes: int, ends: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Between the sweeps of several processes the state cannot be saved: each process has its own rows."""
    monkeypatch.setattr("omniq.distributed.collectives.world_size", lambda: processes)
    loader = PlanLoader(samples=5, batch_size=2, rounds=2, work=3)
    assert len(loader) == 12
    assert [step for step in range(1, 13) if loader.ends_pass(step)] == ends


@layer_wise
def test_gram_stage_under_reduced_matmul_precision_solves_in_float32(
    stage: Callable[[], Stage], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = []

    def spied(module: Any, name: str) -> None:
        work = getattr(module, name)

        def watched(*args: Any, **options: Any) -> Any:
            seen.append(torch.get_float32_matmul_precision())
            return work(*args, **options)

        monkeypatch.setattr(module, name, watched)

    spied(gptq_kernel, "inverse_factor")
    spied(gptq_kernel, "_round_block")
    spied(spqr_kernel, "inverse_factor")
    spied(spqr_kernel, "_round_block")
    spied(alternating_descent, "threshold_step")
    spied(GramModule, "track")
    with matmul_precision("bf16", torch.device("cpu")):
        assert torch.get_float32_matmul_precision() == "medium"
        fitted(stage(), tiny_task(GRID, samples=6), tmp_path)
    assert set(seen) == {"highest"}


@pytest.mark.parametrize("stage", [GPTQ, QuantEase, SpQR])
@pytest.mark.parametrize(
    ("settings", "told"),
    [
        ({"batch_size": 0}, "batch_size 0 of {} is too small: give 1 or more"),
        ({"batch_size": -1}, "batch_size -1 of {}"),
        ({"damping": -0.1}, r"damping -0\.1 of {} is outside 0 to 1"),
        ({"damping": 1.0}, r"damping 1\.0 of {}"),
        ({"damping": float("nan")}, "damping nan of {}"),
    ],
)
def test_gram_stage_invalid_settings_are_refused(stage: type[Stage], settings: dict[str, Any], told: str) -> None:
    with pytest.raises(UserError, match=told.format(stage.__name__)):
        stage(**settings)


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_gram_of_under_autocast_equals_float64(dtype: torch.dtype, weighted: bool, device: str) -> None:
    """The entries exceed the range of float16; the error is that of float32."""
    generator = torch.Generator().manual_seed(0)
    x, weight = (100 * torch.randn(200, 24, generator=generator)).to(dtype), torch.randn(8, 24, generator=generator)
    tokens = torch.rand(200, generator=generator) + 0.5 if weighted else None
    wide = x.double() if tokens is None else x.double() * tokens.double().sqrt().unsqueeze(1)
    expected = wide.t() @ wide
    given = None if tokens is None else tokens.to(device)
    for low in (torch.float16, torch.bfloat16):
        with torch.autocast(device, low), matmul_precision("float32", torch.device(device)):
            gram = gram_of(x.to(device), given)
            power = power_of(weight.to(device), gram)
        assert gram.dtype == power.dtype == torch.float32
        torch.testing.assert_close(gram.cpu().double(), expected, rtol=1e-5, atol=1e-6 * float(expected.max()))
        carried = (weight.double() @ expected * weight.double()).sum()
        torch.testing.assert_close(power.cpu().double(), carried, rtol=1e-5, atol=0)
