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
from omniq.kernels.coordinate_descent import sweep_
from omniq.kernels.layer_problem import prepare
from omniq.solvers.coordinate_descent import CoordinateDescent
from tests.helpers.descent import compare_backends
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
def test_descent_of_largest_stack_stays_within_memory_share(
    bits: int, most: float, monkeypatch: pytest.MonkeyPatch
) -> None:
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


# Measured with the torch version and products in TF32 by hand: 1.5e-2 steps and 2e-3; in float32 4e-5 and 2e-5.
CLOSE = {"float64": (1e-9, 1e-9), "float32": (1e-3, 1e-3), "tf32": (5e-2, 2e-2)}


@pytest.mark.gpu
@pytest.mark.parametrize(
    ("inputs", "bits", "groups", "masked"),
    [(320, 4, 1, False), (330, 2, 5, True), (320, 8, 1, True), (320, 3, 5, False)],
)
@pytest.mark.parametrize("precision", ["float64", "float32", "tf32"])
def test_fused_sweep_on_cuda_equals_torch_sweep(
    precision: str, inputs: int, bits: int, groups: int, masked: bool
) -> None:
    """In float64 the same codes. Otherwise ties fall apart and take others with them: values are judged in place."""
    pytest.importorskip("triton")
    found = compare_backends("cuda", precision, 150, inputs, bits, groups, masked)
    missed, gain = CLOSE[precision]
    assert found["missed"] < missed
    assert found["gain"] < gain
    assert precision != "float64" or found["codes"] == found["counts"] == 0


@pytest.mark.gpu
def test_sweep_in_cuda_graph_equals_eager() -> None:
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


def test_fused_sweep_in_triton_interpreter_equals_torch_sweep() -> None:
    """The kernels' arithmetic, without a GPU, where Triton is installed: its interpreter needs a process of its own."""
    pytest.importorskip("triton")
    code = "import tests.helpers.descent as t\n" + "\n".join(
        f"found = t.compare_backends('cpu', {precision!r}, 40, {inputs}, {bits}, {groups}, {masked})\n"
        f"assert found['codes'] == found['counts'] == 0, found\n"
        f"assert max(found['missed'], found['gain']) < 1e-4, found"
        for precision, inputs, bits, groups, masked in [("float64", 130, 3, 2, True), ("float32", 128, 4, 1, False)]
    )
    environment = os.environ | {"TRITON_INTERPRET": "1", "PYTHONPATH": os.pathsep.join([ROOT, *sys.path])}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
