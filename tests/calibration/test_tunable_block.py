# SPDX-License-Identifier: Apache-2.0
"""A tunable block computes with the values that it exports, and its gradients are those of the formulas."""

import dataclasses

import pytest
import torch
from torch import Tensor
from torch.func import functional_call

from omniq.blocks.weights import load_quantized_weights
from omniq.calibration.tunable_block import TunableBlock, change_shapes, unflatten
from omniq.grid.affine import Grid
from omniq.storage.block_result import BlockResult
from tests.helpers.finished_block import random_changes, rounded_result, some_outliers
from tests.helpers.float64_block import Float64Block
from tests.helpers.tiny import tiny_block

GRIDS = {
    "3 bits in groups": Grid(3, 16),
    "4 bits per channel": Grid(4),
    "2 bits symmetric": Grid(2, 32, symmetric=True, scale_dtype=torch.bfloat16),
    "8 bits symmetric per channel": Grid(8, symmetric=True, scale_dtype=torch.float32),
}
ALL_GRIDS = pytest.mark.parametrize("grid", GRIDS.values(), ids=GRIDS)


def with_outliers(result: BlockResult) -> BlockResult:
    linears = {n: dataclasses.replace(v, outliers=some_outliers(len(v.codes))) for n, v in result.linears.items()}
    return dataclasses.replace(result, linears=linears)


@pytest.mark.parametrize("codes", [False, True])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("group", [16, -1])
def test_tunable_block_weights_equal_exported_ones_bit_for_bit(
    dtype: torch.dtype, symmetric: bool, group: int, codes: bool
) -> None:
    """The values of the forward are those of the changed result, dequantized as a runtime does.

    Norms and biases are float32 in a run, and get the export dtype.
    """
    grid = Grid(3, group, symmetric, dtype)
    result = with_outliers(rounded_result("opt", grid))
    block = TunableBlock(tiny_block("opt")[0], result, codes, dtype)
    changes = random_changes(block.shapes)
    after = block.changed(result, changes)
    for name, linear in after.linears.items():
        before = result.linears[name]
        used = block.weight(name, changes, torch.float32)
        assert torch.equal(used, linear.dequantize())
        assert torch.equal(used.half(), linear.dequantize(torch.float16))
        assert linear.scale.dtype == dtype
        assert not torch.equal(linear.scale, before.scale)
        assert torch.equal(linear.zero_point, before.zero_point)
        assert torch.equal(linear.codes, before.codes) != codes
        assert linear.codes.dtype == torch.uint8
        assert int(linear.codes.max()) <= grid.max_code
        assert linear.outliers is before.outliers
    for name, value in after.tensors.items():
        assert value.dtype == dtype
        assert torch.equal(block.tensor(name, changes), value.float())
        assert not torch.equal(value, result.tensors[name].to(dtype))


@ALL_GRIDS
def test_tunable_block_without_changes_is_result(grid: Grid) -> None:
    result = with_outliers(rounded_result("llama", grid, torch.float16))
    block = TunableBlock(tiny_block()[0], result, True, torch.float16)
    after = block.changed(result, {key: torch.zeros(shape) for key, shape in block.shapes.items()})
    assert after.changed_from(result) == {}


def test_tunable_block_forward_equals_block_with_exported_values() -> None:
    """To the bit: a run evaluates what it tuned."""
    result = with_outliers(rounded_result("opt", Grid(3, 16)))
    (deployed, kwargs), hidden = tiny_block("opt"), torch.randn(2, 16, 64)
    block = TunableBlock(tiny_block("opt")[0], result, True, torch.bfloat16)
    changes = random_changes(block.shapes)
    load_quantized_weights(deployed, block.changed(result, changes))
    output = deployed(hidden, **kwargs)
    assert torch.equal(block.forward(hidden, kwargs, changes), output[0] if isinstance(output, tuple) else output)


def test_tunable_block_scale_stays_positive_in_storage_dtype() -> None:
    """A change of -1 or less ends at the smallest number, one beyond the range at the largest."""
    result = rounded_result("llama", Grid(4, 16))
    block = TunableBlock(tiny_block()[0], result, False, torch.float16)
    for change, value in ((-1.0, 2.0**-24), (-3.0, 2.0**-24), (1e9, 65504.0)):
        changes = {key: torch.full(shape, change) for key, shape in block.shapes.items()}
        after = block.changed(result, changes)
        assert all((linear.scale == value).all() for linear in after.linears.values())


def test_tunable_block_keeps_vectors_of_zeros() -> None:
    result = rounded_result("opt", Grid(4, 16))
    zero = "self_attn.q_proj.bias"
    result = result.with_tensors({f"tensors.{zero}": torch.zeros_like(result.tensors[zero])})
    block = TunableBlock(tiny_block("opt")[0], result, False, torch.float16)
    after = block.changed(result, random_changes(block.shapes))
    assert after.tensors[zero].eq(0).all()


def test_tunable_block_learns_bias_that_transform_added() -> None:
    """A shift gives a linear without bias one."""
    result, name = rounded_result("llama", Grid(4, 16)), "mlp.up_proj.bias"
    bias = torch.randn(128).half()
    result = dataclasses.replace(result, tensors={**result.tensors, name: bias})
    block, kwargs = tiny_block()
    tunable, hidden = TunableBlock(block, result, False, torch.float16), torch.randn(1, 16, 64)
    none = {key: torch.zeros(shape) for key, shape in tunable.shapes.items()}
    leaf = torch.zeros(128, requires_grad=True)
    tunable.forward(hidden, kwargs, {**none, name: leaf}).square().sum().backward()
    assert leaf.grad is not None
    assert leaf.grad.abs().max() > 0


def test_change_shapes_of_block_in_floating_point_are_empty() -> None:
    """Such a block is that of the full-precision model."""
    result = rounded_result("llama", Grid(4, 16))
    assert change_shapes(dataclasses.replace(result, linears={}), True) == {}
    kept = dict(list(result.linears.items())[:1])
    matrix = {"mlp.router.weight": torch.randn(4, 64)}
    partly = dataclasses.replace(result, linears=kept, tensors={**result.tensors, **matrix})
    (name,) = kept
    assert change_shapes(partly, True) == {
        f"{name}:scale": (64, 4),
        f"{name}:codes": (64, 64),
        "input_layernorm.weight": (64,),
        "post_attention_layernorm.weight": (64,),
    }


def test_tunable_block_in_floating_point_runs_as_it_is() -> None:
    (block, kwargs), hidden = tiny_block(), torch.randn(1, 16, 64)
    wanted = block(hidden, **kwargs)
    tensors = {name: value.detach() for name, value in block.named_parameters()}
    tunable = TunableBlock(block, BlockResult({}, tensors), False, torch.float16)
    assert torch.equal(tunable.forward(hidden, kwargs, {}), wanted)
    assert tunable.changed(BlockResult({}, tensors), {}).changed_from(BlockResult({}, tensors)) == {}


def reference_values(
    result: BlockResult, changes: dict[str, Tensor], deployed: BlockResult
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Parameters of the block in float64 from the formulas, with straight-through written as sums, and their leaves."""
    leaves = {key: value.double().requires_grad_() for key, value in changes.items()}
    values: dict[str, Tensor] = {}
    for name, linear in result.linears.items():
        columns = linear.codes.shape[1] // linear.scale.shape[1]
        free = linear.scale.double() * (1 + leaves[f"{name}:scale"])
        scale = deployed.linears[name].scale.double() + free - free.detach()
        codes = linear.codes.double()
        if (offset := leaves.get(f"{name}:codes")) is not None:
            free = (codes + offset).clamp(0, linear.grid.max_code)  # its derivative is one inside, zero outside
            codes = free.detach().round() + free - free.detach()
        rows = []
        for row, (s, z) in enumerate(zip(scale, linear.zero_point.double(), strict=True)):
            index = torch.arange(codes.shape[1]) // columns
            rows.append((codes[row] - z[index]) * s[index])
        weight = torch.stack(rows)
        values[f"{name}.weight"] = (
            weight if linear.outliers is None else weight + linear.outliers.dense(weight.shape[1])
        )
    for name, stored in result.tensors.items():
        vector = stored.double()
        free = vector + leaves[name] * (vector * vector).mean() ** 0.5
        values[name] = deployed.tensors[name].double() + free - free.detach()
    return values, leaves


@ALL_GRIDS
@pytest.mark.parametrize("family", ["llama", "opt"])
@pytest.mark.parametrize("codes", [False, True])
def test_tunable_block_gradients_equal_float64_formula(family: str, grid: Grid, codes: bool) -> None:
    overrides = {"intermediate_size": 64} if family == "llama" else {"ffn_dim": 64}
    result = with_outliers(rounded_result(family, grid, **overrides))
    block, kwargs = tiny_block(family, **overrides)
    tunable = TunableBlock(block, result, codes, torch.float16)
    changes = random_changes(tunable.shapes)
    plain = Float64Block(family, **overrides)
    values, leaves = reference_values(result, changes, tunable.changed(result, changes))
    weights = torch.randn(2, 16, 64, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    hidden = plain.hidden().requires_grad_()
    output = functional_call(plain.block, values, (hidden,), plain.kwargs)
    output = output[0] if isinstance(output, tuple) else output
    (output * weights).sum().backward()

    ours = {key: value.clone().requires_grad_() for key, value in changes.items()}
    single = hidden.detach().float().requires_grad_()
    found = tunable.forward(single, kwargs, ours)
    (found * weights.float()).sum().backward()
    assert (found.double() - output).norm() < 1e-5 * output.norm()
    assert_near(single.grad, hidden.grad)
    for key, leaf in ours.items():
        assert_near(leaf.grad, leaves[key].grad, key)


def assert_near(ours: Tensor | None, wanted: Tensor | None, key: str = "") -> None:
    assert ours is not None, key
    assert wanted is not None, key
    assert (ours.double() - wanted).norm() < 1e-4 * wanted.norm() + 1e-4, key  # that of a bias of keys is zero


def test_unflatten_views_flat_parameter_in_order() -> None:
    flat = torch.arange(11.0, requires_grad=True)
    parts = unflatten(flat, {"a": (2, 3), "b": (), "c": (4,)})
    assert {key: part.tolist() for key, part in parts.items()} == {
        "a": [[0, 1, 2], [3, 4, 5]],
        "b": 6,
        "c": [7, 8, 9, 10],
    }
    sum(part.sum() for part in parts.values()).backward()
    assert flat.grad is not None
    assert flat.grad.eq(1).all()
