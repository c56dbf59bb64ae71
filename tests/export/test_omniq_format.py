# SPDX-License-Identifier: Apache-2.0
"""omniq's own format stores codes and outliers without loss, and a grid for each linear."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from omniq.errors import UserError
from omniq.export import VerificationError
from omniq.export.formats.compressed_tensors import CompressedTensors
from omniq.export.formats.omniq import Omniq, pack_linear, packed_shapes, unpack_linear
from omniq.grid.affine import Grid
from omniq.models.source import SourceModel
from omniq.runtime.linear import PackedLinear
from omniq.storage.block_result import QuantizedLinear
from tests.helpers.exported import WINDOWS, export, opened, rounded, verify
from tests.helpers.outliers import Q_PROJ, edit_tensors, expected_logits, logits, sparse, unquantized, with_outliers
from tests.helpers.schemes import scheme_of


@pytest.fixture
def source(tmp_path: Path) -> SourceModel:
    return opened(tmp_path / "source", Grid(3, 32))


@pytest.mark.parametrize("support", ["unstructured", "structured", "none", "empty"])
@pytest.mark.parametrize(
    ("grid", "tied", "family"),
    [
        (Grid(3, 32), False, "llama"),
        (Grid(3, 16, symmetric=True), True, "llama"),
        (Grid(4, -1, scale_dtype=torch.bfloat16), True, "llama"),
        (Grid(2, 64, symmetric=True, scale_dtype=torch.float32), False, "llama"),
        (Grid(5, 32), True, "opt"),
    ],
    ids=str,
)
def test_omniq_export_opened_by_transformers_has_our_logits(
    grid: Grid, tied: bool, family: str, support: str, tmp_path: Path
) -> None:
    source = opened(tmp_path / "source", grid, family=family, tie_word_embeddings=tied)
    results = sparse(rounded(source, grid), support)
    out = export(source, results, tmp_path / "out", format="omniq", max_shard_bytes=30_000)
    assert len(list(out.glob("*.safetensors"))) > 2
    model = AutoModelForCausalLM.from_pretrained(out)
    assert sum(isinstance(module, PackedLinear) for module in model.modules()) == 2 * len(source.layout(0).linears)
    found = logits(model)
    assert torch.equal(found, expected_logits(source, results, grid.scale_dtype))  # measured: 0.0
    report = verify(out, source, results, format="omniq", windows=WINDOWS, tolerance=0.0)
    assert report.linears == 2 * len(source.layout(0).linears)
    plain = model.dequantize()
    assert not any(isinstance(module, PackedLinear) for module in plain.modules())
    assert torch.equal(logits(plain), found)


def test_omniq_export_keeps_grid_of_each_linear(source: SourceModel, tmp_path: Path) -> None:
    coarse, fine = rounded(source, Grid(3, 32)), rounded(source, Grid(6, -1, symmetric=True))
    mixed = [
        replace(low, linears={**low.linears, "mlp.down_proj": high.linears["mlp.down_proj"]})
        for low, high in zip(coarse, fine, strict=True)
    ]
    mixed = [sparse(mixed, "unstructured")[0], mixed[1]]
    out = export(source, mixed, tmp_path / "out", format="omniq")
    verify(out, source, mixed, format="omniq", windows=WINDOWS, tolerance=0.0)
    entries = json.loads((out / "config.json").read_text())["quantization_config"]["linears"]
    assert entries["model.layers.1.mlp.down_proj"] == {"bits": 6, "group_size": -1, "symmetric": True}
    assert entries[Q_PROJ].keys() == {"bits", "group_size", "symmetric", "outliers"}
    other = replace(mixed[1], linears=rounded(source, Grid(3, 32, scale_dtype=torch.bfloat16))[1].linears)
    with pytest.raises(
        UserError, match=r"layers\.1\.\S+ has scales in torch\.bfloat16, but the model is exported in torch\.float16"
    ):
        export(source, [mixed[0], other], tmp_path / "other", format="omniq")


@pytest.mark.parametrize("format", ["omniq", "compressed-tensors"])
@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("family", ["llama", "opt"])
def test_export_with_unquantized_blocks_keeps_them(format: str, symmetric: bool, family: str, tmp_path: Path) -> None:
    grid = Grid(4, 32, symmetric)
    source = opened(tmp_path / "source", grid, family=family)
    results = [rounded(source, grid)[0], unquantized(source, 1)]
    out = export(source, results, tmp_path / "out", format=format)
    verify(out, source, results, format=format, windows=WINDOWS, tolerance=0.0)
    found = logits(AutoModelForCausalLM.from_pretrained(out))
    assert torch.equal(found, expected_logits(source, results, torch.float16))

    backwards = [unquantized(source, 0), rounded(source, grid)[1]]
    out = export(source, backwards, tmp_path / "backwards", format=format)
    verify(out, source, backwards, windows=WINDOWS, tolerance=0.0, format=format)
    nothing = [unquantized(source, 0), unquantized(source, 1)]
    with pytest.raises(UserError, match="no linear of any block is quantized"):
        export(source, nothing, tmp_path / "nothing", format=format, scheme=scheme_of(grid))


def test_omniq_export_with_new_biases_writes_card_and_bits(source: SourceModel, tmp_path: Path) -> None:
    results = sparse(rounded(source, Grid(3, 32)), "unstructured")
    added = {**results[1].tensors, "self_attn.o_proj.bias": torch.linspace(-1, 1, 64)}
    results[1] = replace(results[1], tensors=added)
    out = export(source, results, tmp_path / "out", format="omniq")
    verify(out, source, results, format="omniq", windows=WINDOWS, tolerance=0.0)
    card = (out / "README.md").read_text()
    assert "`pip install 'transformers>=5.17' omniq`" in card
    assert "import omniq" in card
    linears = [linear for result in results for linear in result.linears.values()]
    bits = sum(linear.bits_per_weight() * linear.codes.numel() for linear in linears)
    mean = bits / sum(linear.codes.numel() for linear in linears)
    assert f"{mean:.3f} bits per weight" in card
    stored = sum(sum(t.nbytes for key, t in pack_linear(x).items() if key != "weight_shape") for x in linears)
    assert stored * 8 == pytest.approx(bits, rel=1e-3)  # measured: 0; words filled up with zeros are not counted


@pytest.mark.parametrize("column", [torch.int16, torch.int32])
@pytest.mark.parametrize("bits", [2, 3, 8])
def test_pack_linear_is_inverted_by_unpack_linear(bits: int, column: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(bits)
    grid = Grid(bits, 5)
    codes = torch.randint(0, 2**bits, (7, 35), generator=generator)
    scale, zero_point = torch.rand(7, 7, generator=generator), torch.randint(0, 2**bits, (7, 7), generator=generator)
    linear = with_outliers(QuantizedLinear.of(grid, codes, scale, zero_point), "unstructured")
    assert linear.outliers is not None
    linear = replace(linear, outliers=replace(linear.outliers, column=linear.outliers.column.to(column)))
    stored = pack_linear(linear)
    shapes = packed_shapes(grid, 7, 35, len(linear.outliers.value))
    assert {name: tuple(tensor.shape) for name, tensor in stored.items()} == {n: s for n, (s, _) in shapes.items()}
    back = unpack_linear(stored, grid)
    assert back.outliers is not None
    assert torch.equal(back.codes, linear.codes)
    assert torch.equal(back.zero_point, linear.zero_point)
    assert back.outliers.column.dtype == column
    assert torch.equal(back.dequantize(), linear.dequantize())


# -- refusals -------------------------------------------------------------------------------------------------------


def test_compressed_tensors_outliers_are_refused_with_omniq_as_remedy(source: SourceModel, tmp_path: Path) -> None:
    results = sparse(rounded(source, Grid(3, 32)), "unstructured")
    with pytest.raises(UserError, match="q_proj has outliers: format compressed-tensors .* use format omniq"):
        export(source, results, tmp_path / "out")
    with pytest.raises(UserError, match="not support the sparse outliers .* use format omniq"):
        CompressedTensors(scheme_of(Grid(3, 32))).check(outliers=True)


def test_omniq_scheme_without_place_is_refused() -> None:
    grid = Grid(4, 32)
    Omniq(scheme_of(grid)).check(outliers=True)
    Omniq(scheme_of(grid, 4, 4, queries=True)).check()
    with pytest.raises(
        UserError, match="scheme W4A8g32: export.format omniq does not support fixed ranges: set scheme"
    ):
        Omniq(scheme_of(grid, 8, activation_range="tensor")).check()
    with pytest.raises(UserError, match=r"cannot hold scales in torch\.float64: use float16"):
        Omniq(scheme_of(Grid(4, scale_dtype=torch.float64))).check()
    symmetric = Grid(4, -1, symmetric=True)
    wrong = QuantizedLinear.of(symmetric, torch.zeros(4, 8), torch.ones(4, 1), torch.full((4, 1), 7))
    with pytest.raises(ValueError, match="x: the zero point of a symmetric grid is not 8"):
        Omniq(scheme_of(symmetric)).check_linear("x", wrong)


def test_verify_changed_outliers_are_named(source: SourceModel, tmp_path: Path) -> None:
    results = sparse(rounded(source, Grid(3, 32)), "unstructured")
    out = export(source, results, tmp_path / "out", format="omniq")
    value = load_file(out / "model.safetensors")[f"{Q_PROJ}.outlier_value"]
    edit_tensors(out, outlier_value=value * 2)
    with pytest.raises(VerificationError, match=rf"{Q_PROJ}: value of outliers differ first at \[0\]"):
        verify(out, source, results, format="omniq")
    edit_tensors(out, outlier_value=None)
    with pytest.raises(VerificationError, match=rf"{Q_PROJ}\.outlier_value is missing in the file"):
        verify(out, source, results, format="omniq")
    edit_tensors(out, outlier_value=None, outlier_column=None, outlier_row_pointer=None)
    with pytest.raises(VerificationError, match=rf"{Q_PROJ}: outliers are in the model only"):
        verify(out, source, results, format="omniq")
