# SPDX-License-Identifier: Apache-2.0
"""The fused sweep chooses what the definition asks for, and solving a layer takes the memory it is said to take."""

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from omniq.grid.affine import Grid
from omniq.kernels import coordinate_descent as kernel
from omniq.kernels import coordinate_descent_torch, layer_problem
from omniq.kernels.coordinate_descent import keep_codes_, sweep_
from omniq.kernels.layer_problem import Problem, codes_of, empty_codes, objective, prepare
from omniq.solvers.coordinate_descent import CoordinateDescent
from tests.helpers.synthetic_layer import fit_grid, make_layer

ROOT = str(Path(__file__).resolve().parents[2])


class Live(TorchDispatchMode):
    """Bytes of all tensors made while it is entered, now and at most; not what a single operation needs inside."""

    def __init__(self) -> None:
        super().__init__()
        self.storages: dict[int, tuple[StorageWeakRef, int]] = {}
        self.most = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        self.storages = {key: each for key, each in self.storages.items() if not each[0].expired()}
        for tensor in tree_leaves(out):
            if isinstance(tensor, Tensor):
                storage = tensor.untyped_storage()
                self.storages[storage.data_ptr()] = StorageWeakRef(storage), storage.nbytes()
        self.most = max(self.most, sum(size for _, size in self.storages.values()))
        return out


@pytest.mark.parametrize(("bits", "most"), [(3, 1.3), (8, 1.33)])
def test_memory_of_a_block(bits: int, most: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """Weights and Gram matrices of a LLaMA-7B block, and what solving its largest stack adds; all at a quarter of size.

    The fused kernel that rounds needs no memory. It is left out here, because the torch version does.
    """
    monkeypatch.setattr(coordinate_descent_torch, "round_block", lambda *_: None)
    for module in (layer_problem, coordinate_descent_torch):
        monkeypatch.setattr(module, "SLICE", 8)
    monkeypatch.setattr(kernel, "_RELAXED_STEPS", kernel._RELAXED_STEPS // 16)
    shapes = [(12288, 4096), (4096, 4096), (22016, 4096), (4096, 11008)]
    given = sum(4 * (o // 4 * (i // 4) + (i // 4) ** 2) for o, i in shapes)
    weight, gram = torch.randn(1024, 5504).t(), torch.eye(1024)
    scale, zero_point, _ = fit_grid(weight, Grid(bits))
    with Live() as live:
        parameter = nn.Parameter(weight, requires_grad=False)
        optimizer = CoordinateDescent(
            [parameter], gram, Grid(bits), scale, zero_point, sweeps=4, damping=0.01, block=64
        )
        for _ in range(4):
            optimizer.step()
        optimizer.result(last=True)
    own = weight.untyped_storage().data_ptr(), gram.untyped_storage().data_ptr()
    assert set(own) <= live.storages.keys()  # neither is copied, so both are among what was counted
    assert given + live.most - 4 * (weight.numel() + gram.numel()) < most * given  # measured: 1.296, 1.326


def _missed(problem: Problem, before: Tensor, after: Tensor, rounded: bool) -> float:
    """How far the values of a sweep are from the best ones, given those left and right of them: in steps of the grid.

    Of rounded values, how far beyond half a step. Unlike equal codes this does not depend on how near a tie each is.
    """
    left = problem.gram.tril(-1)
    gradient = left @ after + (problem.gram - left) @ before
    scale, zero_point = problem.scale[problem.group_index], problem.zero_point[problem.group_index]
    best = (problem.target - before + gradient * problem.inverse[:, None]) / scale
    free = torch.full_like(best, not rounded, dtype=torch.bool)
    if problem.mask is not None:
        free |= problem.mask
    wanted = torch.where(free, best, best.clamp(-zero_point, problem.max_code - zero_point))
    missed = (wanted - (problem.target - after) / scale).abs() - torch.where(free, 0.0, 0.5)
    return float(missed[problem.inverse > 0].max())


def _compare(
    device: str, precision: str, outputs: int, inputs: int, bits: int, groups: int, masked: bool
) -> dict[str, Any]:
    """Three fused sweeps: codes and counts that differ from the torch version's, how far values and gains are off."""
    weight, gram = make_layer(outputs, inputs, tokens=400)
    gram = gram * (torch.arange(inputs) != 7) * (torch.arange(inputs) != 7)[:, None]  # one dead column
    scale, zero_point, _ = fit_grid(weight, Grid(bits, inputs // groups))
    mask = torch.rand(weight.shape, generator=torch.Generator().manual_seed(2)) < 0.03 if masked else None
    layer = [each.to(device) for each in (weight, gram.float(), scale, zero_point)]
    mask = None if mask is None else mask.to(device)
    problem = prepare(*layer, bits, mask=mask, precision=precision, block=96)  # type: ignore[arg-type]
    exact = prepare(*layer, bits, mask=mask, precision="float64", block=96)
    plain, fused = torch.zeros_like(problem.target), torch.zeros_like(problem.target)
    found = {"codes": 0, "counts": 0, "missed": 0.0, "gain": 0.0}
    for rounded in (True, False, True):
        before = fused.to(torch.float64, copy=True)
        changed, _ = sweep_(problem, plain, rounded, "torch")
        fused_changed, gain = sweep_(problem, fused, rounded, "triton")
        found["counts"] += abs(int(changed) - int(fused_changed))
        found["missed"] = max(found["missed"], _missed(exact, before, fused.double(), rounded))
        start, end = objective(exact, before), objective(exact, fused.double())
        found["gain"] = max(found["gain"], float(((end - start - gain).abs() / torch.maximum(start, end)).max()))
    found["codes"] = int((codes_of(problem, plain) != codes_of(problem, fused)).sum())
    odd, kept = torch.arange(outputs, device=device) % 2 == 1, [empty_codes(problem), empty_codes(problem)]
    for backend, packed in zip(("torch", "triton"), kept, strict=True):
        keep_codes_(problem, fused, odd, packed, backend)  # type: ignore[arg-type]
    assert torch.equal(*kept)
    return found


# Measured with the torch version and products in TF32 by hand: 1.5e-2 steps and 2e-3; in float32 4e-5 and 2e-5.
CLOSE = {"float64": (1e-9, 1e-9), "float32": (1e-3, 1e-3), "tf32": (5e-2, 2e-2)}


@pytest.mark.gpu
@pytest.mark.parametrize(
    ("inputs", "bits", "groups", "masked"),
    [(320, 4, 1, False), (330, 2, 5, True), (320, 8, 1, True), (320, 3, 5, False)],
)
@pytest.mark.parametrize("precision", ["float64", "float32", "tf32"])
def test_fused_sweep_does_what_torch_does(precision: str, inputs: int, bits: int, groups: int, masked: bool) -> None:
    """In float64 the same codes. Otherwise ties fall apart and take others with them: values are judged in place."""
    pytest.importorskip("triton")
    found = _compare("cuda", precision, 150, inputs, bits, groups, masked)
    missed, gain = CLOSE[precision]
    assert found["missed"] < missed
    assert found["gain"] < gain
    assert precision != "float64" or found["codes"] == found["counts"] == 0


@pytest.mark.gpu
def test_sweep_can_be_captured() -> None:
    weight, gram = (tensor.float().cuda() for tensor in make_layer(64, 128, tokens=400))
    scale, zero_point, _ = (tensor.cuda() for tensor in fit_grid(weight.cpu(), Grid(4)))
    problem = prepare(weight, gram, scale, zero_point, 4)
    eager, captured = torch.zeros_like(problem.target), torch.zeros_like(problem.target)
    for rounded in (True, False):
        sweep_(problem, eager, rounded)
    graphs = []
    for rounded in (True, False):
        graphs.append(torch.cuda.CUDAGraph())
        with torch.cuda.graph(graphs[-1]):
            sweep_(problem, captured, rounded)
    captured.zero_()
    for graph in graphs:
        graph.replay()
    assert torch.equal(eager, captured)


def test_fused_sweep_in_the_interpreter() -> None:
    """The kernels' arithmetic, without a GPU, where Triton is installed: its interpreter needs a process of its own."""
    pytest.importorskip("triton")
    code = "import tests.kernels.test_fused_descent as t\n" + "\n".join(
        f"found = t._compare('cpu', {precision!r}, 40, {inputs}, {bits}, {groups}, {masked})\n"
        f"assert found['codes'] == found['counts'] == 0, found\n"
        f"assert max(found['missed'], found['gain']) < 1e-4, found"
        for precision, inputs, bits, groups, masked in [("float64", 130, 3, 2, True), ("float32", 128, 4, 1, False)]
    )
    environment = os.environ | {"TRITON_INTERPRET": "1", "PYTHONPATH": os.pathsep.join([ROOT, *sys.path])}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
