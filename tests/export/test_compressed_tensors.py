# SPDX-License-Identifier: Apache-2.0
"""The compressed-tensors format: its package reads omniq's tensors, and what it cannot store is refused."""

from pathlib import Path

import pytest
import torch
from compressed_tensors.compressors import BaseCompressor
from compressed_tensors.quantization import QuantizationConfig

from omniq.errors import UserError
from omniq.export import find_format
from omniq.export.containers import shards
from omniq.export.formats.codec import WrittenLinear
from omniq.export.formats.compressed_tensors import CompressedTensors
from omniq.grid.affine import Grid
from omniq.models.source import SourceModel
from omniq.storage.block_result import BlockResult, Outliers, QuantizedLinear
from tests.helpers.exported import export
from tests.helpers.schemes import scheme_of


@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_compressed_tensors_decompressor_gives_our_bits(symmetric: bool, dtype: torch.dtype) -> None:
    """The scales go down to subnormal numbers."""
    grid = Grid(3, 32, symmetric, dtype)
    generator = torch.Generator().manual_seed(0)
    codes = torch.randint(0, 8, (40, 96), generator=generator)
    scale = 2 ** torch.empty(40, 3).uniform_(-26, 4, generator=generator)
    zero_point = torch.full((40, 3), 4) if symmetric else torch.randint(0, 8, (40, 3), generator=generator)
    linear = QuantizedLinear.of(grid, codes, grid.store(scale), zero_point)
    for scheme in (scheme_of(grid), scheme_of(grid, activation_bits=8)):
        codec = CompressedTensors(scheme)
        stored = codec.store("x", linear)
        config = codec.quantization_config({"x": WrittenLinear.of(linear)}, [])
        theirs = QuantizationConfig.model_validate(config).config_groups["group_0"]
        compressor = BaseCompressor.get_value_from_registry(config["format"])
        by_last_name = {key.removeprefix("x."): value for key, value in stored.items()}
        weight = compressor.decompress(by_last_name, theirs)["weight"]
        assert weight.dtype == dtype
        assert shards.same_bits(weight, linear.dequantize(dtype))
        back = codec.load("x", stored, grid)
        assert torch.equal(back.codes, linear.codes)
        assert torch.equal(back.zero_point, linear.zero_point)


def test_compressed_tensors_unsupported_scheme_is_refused_by_name(
    source: SourceModel, results: list[BlockResult], tmp_path: Path
) -> None:
    grid = Grid(4, 32)
    CompressedTensors(scheme_of(grid)).check()
    CompressedTensors(scheme_of(grid, activation_bits=4)).check()
    with pytest.raises(UserError, match="W4A16g32: export.format compressed-tensors does not support the sparse"):
        CompressedTensors(scheme_of(grid)).check(outliers=True)
    for scheme, words in [
        (scheme_of(grid, 4, 4), "W4A4KV4g32: .*KV cache of 4 bits: use KV16"),
        (
            scheme_of(grid, 4, queries=True),
            "W4A4g32: .*does not support quantized queries: set scheme.queries to false",
        ),
        (scheme_of(Grid(4, scale_dtype=torch.float64)), "scales in torch.float64: use float16, bfloat16 or float32"),
    ]:
        with pytest.raises(UserError, match=words):
            CompressedTensors(scheme).check()
    with pytest.raises(UserError, match="export format 'gguf9' is not known: choose one of auto-round"):
        find_format("gguf9")

    with pytest.raises(UserError, match="max_shard_bytes 0 is too small"):
        export(source, results, tmp_path / "out", max_shard_bytes=0)
    large = BlockResult(results[0].linears, {**results[0].tensors, "input_layernorm.weight": torch.full((64,), 1e6)})
    with pytest.raises(
        UserError, match=r"layers\.0\.input_layernorm\.weight contains values beyond the range of float16: set"
    ):
        export(source, [large, results[1]], tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_compressed_tensors_outliers_and_wrong_zero_points_are_refused() -> None:
    grid = Grid(4, -1, symmetric=True)
    codec = CompressedTensors(scheme_of(grid))
    codes, scale, middle = torch.zeros(4, 8), torch.ones(4, 1), torch.full((4, 1), 8)
    sparse = QuantizedLinear.of(grid, codes, scale, middle, Outliers.from_dense(torch.eye(4, 8)))
    with pytest.raises(UserError, match="x has outliers, which format compressed-tensors does not support"):
        codec.check_linear("x", sparse)
    with pytest.raises(ValueError, match="x: the zero point of a symmetric grid is not 8"):
        codec.check_linear("x", QuantizedLinear.of(grid, codes, scale, middle - 1))
