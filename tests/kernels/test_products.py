# SPDX-License-Identifier: Apache-2.0
"""Float32 products from pairs of float16: nearly as exact as the library's own, and D comes back."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor

from omniq.grid.affine import Grid
from omniq.kernels.layer_problem import prepare
from omniq.kernels.matmul_precision import matmul_precision
from omniq.kernels.products import LibraryProducts, PairProducts, next_power_of_two, products_of, residual_unit
from tests.helpers.synthetic_layer import make_layer, uneven_problem


def worst(found: Tensor, wanted: Tensor) -> float:
    """Largest error of an output feature of the layer, relative to the norm of what it should be."""
    return float(((found.double() - wanted).norm(dim=0) / wanted.norm(dim=0)).max())


@pytest.mark.parametrize("value", [1e-30, 0.0, 3e-8, 1.0, 1.5, 2.0, 1e10])
def test_next_power_of_two_is_smallest_above_value(value: float) -> None:
    found = float(next_power_of_two(torch.tensor([value])))
    assert value < found
    assert found <= 2 * max(value, 2.0**-60)
    assert torch.tensor(found).frexp()[0] == 0.5
    assert torch.isfinite(1 / torch.tensor(found))


@pytest.mark.parametrize("share", [1.0, 1e-2, 1e-4])
def test_residual_unit_on_narrow_grid_keeps_residual_in_float16(share: float) -> None:
    """A searched range is no wider than what matters: weights of inputs that hardly carry anything may be far out."""
    weight, gram = make_layer(24, 64, tokens=200)
    scale, zero_point = Grid(8).fit(*(share * end for end in Grid(8).range(weight)))
    problem = prepare(weight.float(), gram.float(), scale.float(), zero_point.float(), 8)
    unit = residual_unit(problem)
    assert (2 * problem.target / unit).half().isfinite().all()  # D is what a weight and its code differ by
    if share == 1:
        assert torch.equal(unit, next_power_of_two(problem.scale.amax(0)) / 16)


def test_products_of_on_cpu_uses_library() -> None:
    problem, residual = uneven_problem(40, 128, "cpu")
    assert isinstance(products_of(problem, residual, fused=True), LibraryProducts)


@pytest.mark.gpu
@pytest.mark.parametrize(("outputs", "inputs"), [(48, 128), (1000, 512), (4096, 1024), (22016, 256), (40000, 128)])
def test_pair_products_error_is_near_float32(outputs: int, inputs: int) -> None:
    pytest.importorskip("triton")
    problem, residual = uneven_problem(outputs, inputs, "cuda")
    before = residual.clone()
    with matmul_precision("float32", residual.device):
        pairs = products_of(problem, residual, fused=True)
        assert isinstance(pairs, PairProducts)
        for columns in problem.blocks():
            wanted = problem.gram[columns].double() @ before.double()
            out = torch.full((columns.stop - columns.start, outputs), torch.nan, device="cuda")
            plain = torch.mm(problem.gram[columns], before)
            live = problem.inverse[columns] > 0
            error = worst(pairs.gradient(columns, out)[live], wanted[live])
            assert error < 6 * worst(plain[live], wanted[live]) + 1e-6  # measured: 2 to 4 times
            residual[columns] *= -1  # as a sweep changes them
            before[columns] *= -1
            pairs.refresh(columns)
        pairs.finish()
    step = problem.scale.amax(0)
    assert float(((residual - before).abs() / step).max()) < 2.0**-23


@pytest.mark.gpu
def test_products_of_unaligned_or_tf32_layer_uses_library() -> None:
    odd = uneven_problem(44, 128, "cuda")  # rows of 88 bytes
    coarse = uneven_problem(48, 128, "cuda", "tf32")
    assert isinstance(products_of(*odd, True), LibraryProducts)
    assert isinstance(products_of(*coarse, True), LibraryProducts)


ROOT = str(Path(__file__).resolve().parents[2])

INTERPRETED = """
import torch
from omniq.kernels import products_triton as kernels
from tests.helpers.synthetic_layer import uneven_problem
from omniq.kernels.products import next_power_of_two


problem, residual = uneven_problem(44, 70, "cpu")
before = residual.clone()
unit, columns = next_power_of_two(problem.scale.amax(0)) / 16, slice(8, 40)
kernels.split_rows_(residual, 1 / unit)
high, low = residual.view(torch.float16).view(70, 2, 44).double().unbind(1)
assert ((high + low) * unit - before).abs().max() < 2**-23 * problem.scale.max()
norm = problem.gram.diagonal().sqrt()
row_unit = next_power_of_two(norm * norm.max()) / 4096
upper, lower = torch.full((2, 32, 70), torch.nan, dtype=torch.float16)
kernels.split_into_halves(problem.gram[columns], (1 / row_unit)[columns], upper, lower)
assert ((upper.double() + lower.double()) * row_unit[columns, None] - problem.gram[columns]).abs().max() < (
    2**-22 * problem.gram.max()
)
product = (upper.double() @ (high + low) + lower.double() @ high).float()
untouched = residual.clone()
kernels.join_rows_(residual[columns], unit, product, row_unit[columns])
wanted = problem.gram[columns].double() @ before.double()
assert (product - wanted).norm() < 1e-6 * wanted.norm()
assert ((residual[columns] - before[columns]).abs() / problem.scale[0]).max() < 2**-23
assert torch.equal(residual[:8].view(torch.int32), untouched[:8].view(torch.int32))
assert torch.equal(residual[40:].view(torch.int32), untouched[40:].view(torch.int32))
"""


def test_pair_kernels_in_triton_interpreter_split_and_join_exactly() -> None:
    """Without a GPU, where Triton is installed: its interpreter needs a process of its own."""
    pytest.importorskip("triton")
    environment = os.environ | {"TRITON_INTERPRET": "1", "PYTHONPATH": os.pathsep.join([ROOT, *sys.path])}
    done = subprocess.run([sys.executable, "-c", INTERPRETED], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
