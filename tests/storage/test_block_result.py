# SPDX-License-Identifier: Apache-2.0
"""Block results: their bits, their weights, and the file that holds them."""

from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from omniq.blocks.weights import load_quantized_weights
from omniq.errors import CorruptFile
from omniq.grid.affine import Grid
from omniq.storage.block_result import BlockResult, Outliers, QuantizedLinear
from omniq.storage.sealed import load_state, save_state

in_one_folder = settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


def equal(left: Tensor, right: Tensor) -> bool:
    return left.dtype == right.dtype and left.shape == right.shape and torch.equal(left, right)


@in_one_folder
@given(st.data())
def test_load_of_altered_file_is_refused_or_equal(tmp_path: Path, data: st.DataObject) -> None:
    """Each changed byte and each cut of a result or a state is refused by name, or changes nothing."""
    result, state = tmp_path / "result", {"x": torch.arange(3), "n": 2}
    example().save(result)
    save_state(tmp_path / "state", state)
    for path in (result, tmp_path / "state"):
        content = bytearray(path.read_bytes())
        place = data.draw(st.integers(0, len(content) - 1))
        if data.draw(st.booleans()):
            content[place] ^= 1 << data.draw(st.integers(0, 7))
        else:
            del content[place:]
        path.write_bytes(content)
        if path != result:
            with pytest.raises(CorruptFile, match=str(path)):
                load_state(path)
            continue
        try:
            loaded = BlockResult.load(path)
        except CorruptFile:
            continue
        assert_same(loaded, example())  # such as a blank of the header that became another blank


def linear(grid: Grid, outliers: bool = False, seed: int = 0) -> QuantizedLinear:
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(6, 16, generator=generator)
    scale, zero_point = grid.fit(*grid.range(weight))
    dense = weight * (torch.rand(weight.shape, generator=generator) < 0.1)
    sparse = Outliers.from_dense(dense) if outliers else None
    return QuantizedLinear.of(grid, grid.quantize(weight, scale, zero_point), scale, zero_point, sparse)


def example() -> BlockResult:
    linears = {
        "self_attn.q_proj": linear(Grid(3, 4)),
        "mlp.up_proj": linear(Grid(8, -1, True, torch.bfloat16), outliers=True),
    }
    others = {
        "self_attn.q_proj.bias": torch.randn(6, generator=torch.Generator().manual_seed(3)),
        "norm.weight": torch.ones(16),
    }
    return BlockResult(linears, others, {"loss": 0.1, "guard": "text", "nested": {"a": [1, None]}})


def assert_same(found: BlockResult, expected: BlockResult) -> None:
    assert found.summary == expected.summary
    assert found.linears.keys() == expected.linears.keys()
    assert found.tensors.keys() == expected.tensors.keys()
    assert all(equal(found.tensors[name], value) for name, value in expected.tensors.items())
    for name, theirs in expected.linears.items():
        ours = found.linears[name]
        assert ours.grid == theirs.grid
        for part in ("codes", "scale", "zero_point"):
            assert equal(getattr(ours, part), getattr(theirs, part))
        assert (ours.outliers is None) == (theirs.outliers is None)
        if ours.outliers is not None and theirs.outliers is not None:
            assert all(equal(value, vars(theirs.outliers)[key]) for key, value in vars(ours.outliers).items())


def test_block_result_saved_is_loaded_back(tmp_path: Path) -> None:
    example().save(tmp_path / "block")
    assert_same(BlockResult.load(tmp_path / "block"), example())


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 2**16), st.floats(0, 1))
def test_outliers_from_dense_round_trip(seed: int, share: float) -> None:
    """The pattern is arbitrary and may have empty rows; values are rounded to float16 once."""
    generator = torch.Generator().manual_seed(seed)
    dense = torch.randn(5, 7, generator=generator) * (torch.rand(5, 7, generator=generator) < share)
    sparse = Outliers.from_dense(dense)
    assert torch.equal(sparse.dense(7), dense.half().float())
    assert sparse.row_pointer.tolist() == [0, *(dense != 0).sum(1).cumsum(0).tolist()]
    kinds = (sparse.row_pointer.dtype, sparse.column.dtype, sparse.value.dtype)
    assert kinds == (torch.int32, torch.int16, torch.float16)


def test_outliers_of_wide_layer_have_32_bit_columns() -> None:
    """16 bits cannot count these columns."""
    dense = torch.zeros(2, 2**15 + 1)
    dense[1, -1] = 0.5
    sparse = Outliers.from_dense(dense)
    assert sparse.column.dtype == torch.int32
    assert torch.equal(sparse.dense(2**15 + 1), dense)
    assert Outliers.from_dense(dense[:, 1:]).column.dtype == torch.int16


def test_quantized_linear_dequantize_and_bits_equal_formula() -> None:
    sparse = linear(Grid(3, 4), outliers=True)
    assert sparse.outliers is not None
    scale, zero = sparse.scale.float().repeat_interleave(4, 1), sparse.zero_point.float().repeat_interleave(4, 1)
    expected = (sparse.codes.float() - zero) * scale + sparse.outliers.dense(16)
    assert torch.equal(sparse.dequantize(), expected)
    assert torch.equal(sparse.dequantize(torch.bfloat16), expected.bfloat16())
    stored = 96 * 3 + 24 * 16 + 24 * 3 + 7 * 32 + sparse.outliers.value.numel() * (16 + 16)
    assert sparse.bits_per_weight() == stored / 96
    assert linear(Grid(4, -1, symmetric=True)).bits_per_weight() == (96 * 4 + 6 * 16) / 96  # no zero points stored


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_load_quantized_weights_sets_deployed_weights(device: str) -> None:
    """The module stays on its device and has the same bits as on the CPU."""
    block = torch.nn.ModuleDict({"q": torch.nn.Linear(16, 6), "norm": torch.nn.LayerNorm(16, bias=False)}).to(device)
    parts = {"q.bias": torch.ones(6), "norm.weight": torch.zeros(16)}
    result = BlockResult({"q": linear(Grid(3, 4), outliers=True)}, parts)
    load_quantized_weights(block, result)
    assert torch.equal(block["q"].weight.cpu(), result.linears["q"].dequantize())
    assert block["q"].bias.eq(1).all()
    assert block["norm"].weight.eq(0).all()
    assert result.with_summary(seconds=1).summary == {"seconds": 1}


def test_quantized_linear_stores_contiguous_tensors() -> None:
    codes = torch.randint(0, 15, (32, 8), dtype=torch.uint8).t()
    scale = torch.ones(2, 8, dtype=torch.float16).t()
    linear = QuantizedLinear(Grid(4, 16), codes, scale, scale.to(torch.uint8))
    assert all(part.is_contiguous() for part in (linear.codes, linear.scale, linear.zero_point))
    assert torch.equal(linear.codes, codes)


def test_block_result_stores_contiguous_tensors() -> None:
    assert BlockResult({}, {"x": torch.randn(4, 3).t()}).tensors["x"].is_contiguous()
