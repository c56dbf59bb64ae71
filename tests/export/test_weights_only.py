# SPDX-License-Identifier: Apache-2.0
"""GPTQ, AWQ and AutoRound: readers of the published layouts find our weights, and unsupported runs are refused."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers.utils.quantization_config import AutoRoundConfig, AwqConfig, GPTQConfig

from omniq.errors import UserError
from omniq.export import VerificationError, check_format
from omniq.export.containers.shards import ShardReader
from omniq.export.formats.auto_round import AutoRound
from omniq.export.formats.awq import Awq
from omniq.export.formats.codec import WrittenLinear, stored_under
from omniq.export.formats.gptq import Gptq
from omniq.export.formats.packing import pack
from omniq.grid.affine import Grid
from omniq.grid.rule import Rule
from omniq.grid.scheme import Scheme
from omniq.models.source import SourceModel
from omniq.storage.block_result import BlockResult, Outliers, QuantizedLinear
from tests.helpers.exported import WINDOWS, export, opened, rounded, verify
from tests.helpers.published_layouts import awq_weight, gptq_weight
from tests.helpers.schemes import scheme_of
from tests.helpers.tiny import save_tiny

NAME = "model.layers.0.mlp.up_proj"
FORMATS = {"gptq": Gptq, "awq": Awq, "auto-round": AutoRound}
LINEARS = st.tuples(st.booleans(), st.integers(1, 3), st.integers(1, 3), st.integers(0, 99))


def linear_on(grid: Grid, outputs: int, inputs: int, seed: int = 0) -> QuantizedLinear:
    """A random linear that contains the smallest and the largest zero point, unless its grid is symmetric."""
    generator = torch.Generator().manual_seed(seed)
    groups = grid.groups(inputs)
    codes = torch.randint(0, 2**grid.bits, (outputs, inputs), generator=generator)
    scale = grid.store(2 ** torch.empty(outputs, groups).uniform_(-14, 2, generator=generator))
    zero_point = torch.randint(0, 2**grid.bits, (outputs, groups), generator=generator)
    zero_point[0], zero_point[-1] = 0, grid.max_code
    middle = torch.full_like(zero_point, 2 ** (grid.bits - 1))
    return QuantizedLinear.of(grid, codes, scale, middle if grid.symmetric else zero_point)


def check_round_trip(codec: Any, linear: QuantizedLinear) -> dict[str, torch.Tensor]:
    """Store a linear, load it again by the config, compare; return its tensors."""
    codec.check_linear(NAME, linear)
    tensors = codec.store(NAME, linear)
    config = codec.quantization_config({NAME: WrittenLinear.of(linear)}, ["lm_head"])
    found = codec.load(NAME, tensors, codec.grid_of(NAME, config, linear.grid.scale_dtype))
    assert found.grid == linear.grid
    for part in ("codes", "scale", "zero_point"):
        assert torch.equal(getattr(found, part), getattr(linear, part)), part
    return stored_under(NAME, tensors)


def exact(linear: QuantizedLinear) -> np.ndarray:
    return linear.dequantize(torch.float64).numpy()


# -- layouts --------------------------------------------------------------------------------------------------------


@settings(max_examples=40, deadline=None)
@given(st.sampled_from([2, 3, 4, 8]), LINEARS)
def test_gptq_published_layout_holds_our_weights(bits: int, given: tuple[bool, int, int, int]) -> None:
    symmetric, outputs, inputs, seed = given
    linear = linear_on(Grid(bits, 32, symmetric), 32 * outputs, 32 * inputs, seed)
    codec = Gptq(scheme_of(linear.grid))
    stored = check_round_trip(codec, linear)
    version = codec.quantization_config({NAME: WrittenLinear.of(linear)}, [])["checkpoint_format"]
    assert version == ("gptq" if symmetric else "gptq_v2")
    group_of = stored["g_idx"].tolist()
    assert group_of == [index // 32 for index in range(32 * inputs)]
    assert np.array_equal(gptq_weight(stored, bits, int(version == "gptq"), group_of), exact(linear))
    assert stored["qweight"].shape == (inputs * bits, 32 * outputs)
    assert stored["qzeros"].shape == (inputs, outputs * bits)


@settings(max_examples=20, deadline=None)
@given(LINEARS)
def test_awq_published_layout_holds_our_weights(given: tuple[bool, int, int, int]) -> None:
    symmetric, outputs, inputs, seed = given
    linear = linear_on(Grid(4, 32, symmetric), 32 * outputs, 32 * inputs, seed)
    stored = check_round_trip(Awq(scheme_of(linear.grid)), linear)
    assert np.array_equal(awq_weight(stored, [index // 32 for index in range(32 * inputs)]), exact(linear))
    assert stored["qweight"].shape == (32 * inputs, 4 * outputs)


@settings(max_examples=40, deadline=None)
@given(st.sampled_from([2, 3, 4, 8]), st.sampled_from([-1, 16, 32]), LINEARS)
def test_auto_round_published_layout_holds_our_weights(
    bits: int, group: int, given: tuple[bool, int, int, int]
) -> None:
    symmetric, outputs, inputs, seed = given
    linear = linear_on(Grid(bits, group, symmetric), 32 * outputs, 32 * inputs, seed)
    codec = AutoRound(scheme_of(linear.grid))
    stored = check_round_trip(codec, linear)
    packing = codec.quantization_config({NAME: WrittenLinear.of(linear)}, [])["packing_format"]
    assert packing == ("auto_round:auto_gptq" if symmetric else "auto_round")
    size = 32 * inputs if group == -1 else group
    group_of = [index // size for index in range(32 * inputs)]
    assert np.array_equal(gptq_weight(stored, bits, int(symmetric), group_of), exact(linear))
    assert "g_idx" not in stored


def test_gptq_damaged_tensors_are_refused() -> None:
    linear = linear_on(Grid(4, 32, True), 32, 64)
    codec = Gptq(scheme_of(linear.grid))
    whole = codec.store(NAME, linear)
    config = codec.quantization_config({NAME: WrittenLinear.of(linear)}, [])
    grid = codec.grid_of(NAME, config, torch.float16)
    for key, value, message in [
        ("qzeros", torch.full_like(whole[f"{NAME}.qzeros"], -1), "a zero point is 16, above 15"),
        ("g_idx", whole[f"{NAME}.g_idx"].flip(0), "g_idx does not give groups of 32 inputs in order"),
        ("qzeros", whole[f"{NAME}.qzeros"][:, 1:].contiguous(), "32 codes of 4 bits take 4 words"),
    ]:
        with pytest.raises(ValueError, match=message):
            codec.load(NAME, {**whole, f"{NAME}.{key}": value}, grid)
    with pytest.raises(KeyError, match="scales"):
        codec.load(NAME, {f"{NAME}.qweight": whole[f"{NAME}.qweight"]}, grid)


def test_checkpoints_of_other_programs_are_read_by_their_version() -> None:
    """GPTQModel writes symmetric models in version 2 too, and asymmetric ones in version 1; AutoRound writes both."""
    gptq, auto_round = Gptq(Scheme("W4A16g32")), AutoRound(Scheme("W4A16g32"))
    for symmetric in (True, False):
        linear = linear_on(Grid(4, 32, symmetric, zero_points="nonzero"), 32, 64)
        zero_point = linear.zero_point.clamp(min=1)
        linear = QuantizedLinear(linear.grid, linear.codes, linear.scale, zero_point)
        entry = {"bits": 4, "group_size": 32, "sym": symmetric}
        for offset in (0, 1):
            stored = gptq.store(NAME, linear) | {f"{NAME}.qzeros": pack(zero_point.t().contiguous() - offset, 4)}
            config = entry | {"checkpoint_format": "gptq" if offset else "gptq_v2"}
            found = gptq.load(NAME, stored, gptq.grid_of(NAME, config, torch.float16))
            assert torch.equal(found.zero_point, zero_point)
            config = entry | {"packing_format": "auto_round:auto_gptq" if offset else "auto_round"}
            found = auto_round.load(NAME, stored, auto_round.grid_of(NAME, config, torch.float16))
            assert torch.equal(found.zero_point, zero_point)
    for codec, config in [
        (gptq, entry | {"dynamic": {"+:.*up_proj": {"bits": 8}}}),
        (auto_round, entry | {"packing_format": "auto_round:auto_awq"}),
        (Awq(Scheme("W4A16g32")), {"bits": 4, "group_size": 32, "zero_point": True, "version": "gemv"}),
    ]:
        with pytest.raises(KeyError):
            codec.grid_of(NAME, config, torch.float16)


# -- config.json ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("symmetric", [False, True])
def test_quantization_config_is_read_by_transformers(symmetric: bool) -> None:
    grid = Grid(4, 64, symmetric)
    linears = {NAME: WrittenLinear.of(linear_on(grid, 32, 64))}

    def config(format: str) -> dict[str, Any]:
        return FORMATS[format](scheme_of(grid)).quantization_config(linears, ["lm_head"])

    gptq, awq = GPTQConfig.from_dict(config("gptq")), AwqConfig.from_dict(config("awq"))
    auto_round = AutoRoundConfig.from_dict(config("auto-round"))
    for theirs in (gptq, awq, auto_round):
        assert (theirs.bits, theirs.group_size) == (4, 64)
    assert gptq.sym is auto_round.sym is symmetric
    assert gptq.format == ("gptq" if symmetric else "gptq_v2")
    assert (gptq.desc_act, gptq.block_name_to_quantize) == (False, "model.layers")
    assert (awq.zero_point, awq.format, awq.modules_to_not_convert) == (not symmetric, "gemm", ["lm_head"])


def test_quantization_config_names_linears_in_floating_point() -> None:
    grid, plain = Grid(4, 32), "model.layers.1.mlp.up_proj"
    linears = {NAME: WrittenLinear.of(linear_on(grid, 32, 64))}
    found = {
        name: made(scheme_of(grid)).quantization_config(linears, [plain, "lm_head"]) for name, made in FORMATS.items()
    }
    assert found["gptq"]["modules_in_block_to_quantize"] == [[NAME]]
    assert found["gptq"]["dynamic"] == {r"-:^model\.layers\.1\.mlp\.up_proj$": {}}
    assert found["awq"]["modules_to_not_convert"] == [plain, "lm_head"]
    assert found["auto-round"]["extra_config"] == {plain: {"bits": 16}}
    for name, made in FORMATS.items():
        with pytest.raises(KeyError):
            made(scheme_of(grid)).grid_of(plain, found[name], torch.float16)


def test_auto_round_config_gives_each_linear_its_grid() -> None:
    scheme = Scheme("W4A16g32", rules=(Rule("*.up_proj", "W8A16g64", symmetric=True),))
    codec, other = AutoRound(scheme), "model.layers.0.mlp.down_proj"
    grids = {NAME: Grid(8, 64, True), other: Grid(4, 32), "model.layers.1.mlp.down_proj": Grid(4, 32)}
    config = codec.quantization_config(
        {name: WrittenLinear.of(linear_on(grid, 32, 64)) for name, grid in grids.items()}, []
    )
    assert config["extra_config"] == {NAME: {"bits": 8, "group_size": 64, "sym": True}}
    assert config["packing_format"] == "auto_round"
    assert all(codec.grid_of(name, config, torch.float16) == grid for name, grid in grids.items())


# -- whole checkpoints ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("format", "grid", "stored", "container_bits"),
    [
        ("gptq", Grid(3, 32), Grid(3, 32), None),
        ("gptq", Grid(4, -1), Grid(4, 64), None),
        ("gptq", Grid(2, 32), Grid(4, 32, True), 4),
        ("gptq", Grid(5, -1), Grid(8, 64, True), 8),
        ("awq", Grid(4, 32), Grid(4, 32), None),
        ("awq", Grid(3, -1), Grid(4, 64, True), 4),
        ("auto-round", Grid(2, -1), Grid(2, -1), None),
        ("auto-round", Grid(3, 16), Grid(8, 16, True), 8),
        ("compressed-tensors", Grid(3, 32), Grid(4, 32, True), 4),
    ],
)
def test_export_is_verified_and_holds_exact_weights(
    format: str, grid: Grid, stored: Grid, container_bits: int | None, tmp_path: Path
) -> None:
    source = opened(tmp_path / "source", grid)
    results = rounded(source, grid)
    options: dict[str, Any] = {"format": format, "container_bits": container_bits}
    out = export(source, results, tmp_path / "out", **options)
    report = verify(out, source, results, **options, tolerance=1e-3)
    assert report.linears == 14
    if format != "compressed-tensors":
        config = json.loads((out / "config.json").read_text())["quantization_config"]
        assert (config["bits"], config["group_size"]) == (stored.bits, stored.group_size)
    card = (out / "README.md").read_text()
    assert (f"stores the same weights in {scheme_of(stored)}, which takes" in card) == (stored != grid)
    name = f"{source.block_name(1)}.mlp.down_proj"
    with ShardReader(out) as reader:
        tensors = stored_under(name, {key: reader[key] for key in reader.names})
    expected = exact(results[1].linears["mlp.down_proj"])
    group_of = [index // (128 if stored.group_size == -1 else stored.group_size) for index in range(128)]
    if format == "awq":
        assert np.array_equal(awq_weight(tensors, group_of), expected)
    elif format != "compressed-tensors":
        assert np.array_equal(gptq_weight(tensors, stored.bits, int(stored.symmetric), group_of), expected)


def test_verify_finds_changed_code_of_wider_grid(tmp_path: Path) -> None:
    grid = Grid(3, 32)
    source = opened(tmp_path / "source", grid)
    results = rounded(source, grid)
    options: dict[str, Any] = {"format": "awq", "container_bits": 4}
    out = export(source, results, tmp_path / "out", **options)
    linear = results[0].linears["mlp.up_proj"]
    codes = linear.codes.clone()
    codes[3, 5] ^= 1
    changed = QuantizedLinear(grid, codes, linear.scale, linear.zero_point)
    other = BlockResult({**results[0].linears, "mlp.up_proj": changed}, results[0].tensors)
    with pytest.raises(VerificationError, match=r"up_proj: codes differ first at \[3, 5\]"):
        verify(out, source, [other, results[1]], **options)
    assert verify(out, source, results, **options, windows=WINDOWS, tolerance=1e-3).windows == 2


# -- what is refused ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("format", "scheme", "message"),
    [
        ("gptq", Scheme("W4A8g32"), "does not support quantized activations: use A16.*hold it: compressed-tensors"),
        ("awq", Scheme("W4A16KV4g32"), "does not support quantized activations: use A16, and no KV; .*hold it: omniq$"),
        ("gptq", Scheme("W4A16g32", dtype="bfloat16"), "float16 only, not in bfloat16: set scheme.dtype to float16"),
        ("gptq", Scheme("W5A16g32"), "does not support 5 bits, only 2, 3, 4 or 8: set export.container_bits to 8"),
        (
            "awq",
            Scheme("W3A16g32"),
            "does not support 3 bits, only 4: set export.container_bits to 4; formats that can",
        ),
        ("awq", Scheme("W8A16g32"), "does not support 8 bits, only 4: use 4 bits"),
        ("gptq", Scheme("W4A16g16"), "groups of 16, only of 32, .* or 1024: use one.*compressed-tensors, omniq, auto"),
        ("awq", Scheme("W4A16g16"), "does not support groups of 16, only of 32, 64 or 128"),
        ("gptq", Scheme("W4A16g32", rules=(Rule("*.up_proj", "W8A16g32"),)), "does not support 2 grids in one model"),
    ],
)
def test_check_format_refuses_scheme_and_names_formats_that_can(
    format: str, scheme: Scheme, message: str, source: SourceModel
) -> None:
    with pytest.raises(UserError, match=message):
        check_format(format, scheme, source=source)


@pytest.mark.parametrize("format", FORMATS)
def test_check_format_refuses_odd_shapes_before_run(format: str, tmp_path: Path) -> None:
    source = opened(tmp_path / "source", Grid(4, -1), num_key_value_heads=1)  # keys and values have 16 outputs
    with pytest.raises(UserError, match="a linear of 16 outputs and 64 inputs, which are not both multiples of 32"):
        check_format(format, Scheme("W4A16"), source=source)
    rules = (Rule("*.[kv]_proj", "none"),)
    check_format(format, Scheme("W4A16", rules=rules), source=source)


@pytest.mark.parametrize("format", FORMATS)
def test_check_format_refuses_outliers_before_run(format: str) -> None:
    with pytest.raises(UserError, match="does not support the sparse outliers.*; formats that can hold it: omniq$"):
        check_format(format, Scheme("W4A16g32"), outliers=True)
    with pytest.raises(UserError, match="export.container_bits 4 does not support outliers"):
        check_format(format, Scheme("W3A16g32"), outliers=True, container_bits=4)
    linear = linear_on(Grid(4, 32), 32, 64)
    sparse = QuantizedLinear(
        linear.grid, linear.codes, linear.scale, linear.zero_point, Outliers.from_dense(torch.eye(32, 64))
    )
    with pytest.raises(UserError, match=f"x has outliers, which format {format} does not support: use format omniq"):
        FORMATS[format](Scheme("W4A16g32")).check_linear("x", sparse)


def test_awq_refuses_family_with_scaled_activations(source: SourceModel) -> None:
    layout = replace(source.layout(0), model_type="bloom")
    with pytest.raises(UserError, match="awq does not support bloom, where transformers expects scaled activations"):
        Awq(Scheme("W4A16g32")).check([layout])
    Gptq(Scheme("W4A16g32")).check([layout])


@pytest.mark.parametrize("format", FORMATS)
def test_check_format_refuses_experts(format: str, tmp_path: Path) -> None:
    source = SourceModel.open(save_tiny(tmp_path / "source", "mixtral"))
    with pytest.raises(UserError, match="does not support the experts of mixtral: use format omniq; formats that can"):
        check_format(format, Scheme("W4A16g32"), source=source)
