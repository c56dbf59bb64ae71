# SPDX-License-Identifier: Apache-2.0
"""The GGUF container: blocks of ggml, the file, its metadata, and what it refuses."""

import random
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from transformers import AutoTokenizer

from omniq.errors import CorruptFile, UserError
from omniq.export import VerificationError, check_format
from omniq.export.containers.gguf_file import GgufReader
from omniq.export.containers.gguf_model import config_metadata, rope_factors
from omniq.export.formats.ggml import BLOCK_TYPES, Q2_0, Ggml, block_type
from omniq.grid.affine import Grid
from omniq.grid.scheme import Scheme
from omniq.models.source import SourceModel
from omniq.storage.block_result import BlockResult, QuantizedLinear
from tests.helpers.exported import WINDOWS, export, opened, rounded, verify
from tests.helpers.opening import SMOL, needs_smol
from tests.helpers.schemes import scheme_of
from tests.helpers.tiny import tiny_tokenizer

GRIDS = {
    "Q2_0": [Grid(2, 64, True), Grid(2, 128, True)],
    "Q4_0": [Grid(4, 32, True), Grid(4, -1, True), Grid(3, 64), Grid(2, 64), Grid(2, 32, True), Grid(3, 128, True)],
    "Q5_0": [Grid(4, 32), Grid(4, 128), Grid(4, -1), Grid(5, 64, True)],
    "Q8_0": [Grid(8, 32, True), Grid(8, -1, True), Grid(5, 64), Grid(7, 32)],
}
EVERY = [(name, grid) for name, grids in GRIDS.items() for grid in grids]


def linear_on(grid: Grid, outputs: int = 6, inputs: int = 256) -> QuantizedLinear:
    """Every code and zero point of the grid, at random places."""
    generator = torch.Generator().manual_seed(grid.bits)
    shape = (outputs, grid.groups(inputs))
    codes = torch.randint(0, grid.max_code + 1, (outputs, inputs), generator=generator)
    codes[0, :2] = torch.tensor([0, grid.max_code])
    zero_point = torch.randint(0, grid.max_code + 1, shape, generator=generator)
    zero_point = torch.full(shape, 2 ** (grid.bits - 1)) if grid.symmetric else zero_point
    return QuantizedLinear.of(grid, codes, torch.rand(shape, generator=generator) + 0.01, zero_point)


def dequantized_q2_0(data: np.ndarray) -> np.ndarray:
    """The formula of ``dequantize_row_q2_0`` for one row, element by element."""
    values = []
    for block in data.reshape(-1, 18):
        d = float(block[:2].view(np.float16)[0])
        values += [d * ((int(block[2 + k // 4]) >> 2 * (k % 4) & 3) - 1) for k in range(64)]
    return np.array(values)


@pytest.mark.parametrize(("name", "grid"), EVERY)
def test_ggml_blocks_hold_weights_exactly(name: str, grid: Grid) -> None:
    linear, codec = linear_on(grid), Ggml(scheme_of(grid))
    [(key, data)] = codec.store("a.x", linear).items()
    assert key == f"a.x.{name}"
    expected = linear.dequantize(torch.float64).numpy()
    if name == "Q2_0":
        found = np.stack([dequantized_q2_0(row) for row in data.numpy()])
    else:
        found = gguf.quants.dequantize(data.numpy(), gguf.GGMLQuantizationType[name])
    assert np.array_equal(found, expected)
    assert codec.bits(grid) == BLOCK_TYPES[name].bits


@pytest.mark.parametrize(("name", "grid"), EVERY)
def test_ggml_load_returns_stored_linear(name: str, grid: Grid) -> None:
    linear, codec = linear_on(grid), Ggml(scheme_of(grid))
    found, expected = codec.load("a.x", codec.store("a.x", linear), grid), codec.as_stored(linear)
    assert found.grid == expected.grid == Grid(BLOCK_TYPES[name].bits, grid.group_size, True)
    for part in ("codes", "scale", "zero_point"):
        assert torch.equal(getattr(found, part), getattr(expected, part))
    assert torch.equal(found.dequantize(), linear.dequantize())


def test_ggml_load_different_scales_in_group_are_refused() -> None:
    grid = Grid(4, 64, True)
    codec = Ggml(scheme_of(grid))
    stored = codec.store("x", linear_on(grid))
    stored["x.Q4_0"][0, 18] ^= 1  # the scale of the second block of the first group
    with pytest.raises(ValueError, match="the blocks of a group have different scales"):
        codec.load("x", stored, grid)


@pytest.mark.parametrize("grid", [Grid(8, 32), Grid(4, 16), Grid(2, 48)])
def test_block_type_of_grid_that_no_block_holds_is_none(grid: Grid) -> None:
    assert block_type(grid) is None


@pytest.mark.parametrize(
    ("scheme", "message"),
    [
        (Scheme("W4A8g32"), "does not support quantized activations: use A16, and no KV"),
        (Scheme("W4A16KV4g32"), "does not support quantized activations"),
        (
            Scheme("W4A16g32", dtype="bfloat16"),
            "holds scales in float16 only, not in bfloat16: set scheme.dtype to float16",
        ),
        (Scheme("W4A16g16"), "does not support groups of 16, only multiples of 32: use g32, g64 or g128"),
        (Scheme("W8A16g32"), "does not support 8 bits with zero points: set scheme.symmetric to true, or use W7"),
    ],
)
def test_check_scheme_that_blocks_cannot_hold_is_refused(scheme: Scheme, message: str, source: SourceModel) -> None:
    with pytest.raises(UserError, match=f"scheme {scheme.name}: export.format gguf {message}"):
        check_format("gguf", scheme, source=source)


def test_check_outliers_are_refused() -> None:
    with pytest.raises(UserError, match="does not support the sparse outliers .*: use a method without them"):
        Ggml(Scheme("W4A16g32")).check(outliers=True)


@pytest.mark.parametrize(
    ("family", "overrides", "message"),
    [
        (
            "opt",
            {},
            "does not support models of type 'opt'; .* use another format; formats that can hold it: ",
        ),
        (
            "llama",
            {"rope_parameters": {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}},
            "does not support the rotary embedding 'dynamic'",
        ),
        ("llama", {"hidden_act": "gelu"}, "does not support the activation 'gelu'"),
    ],
)
def test_check_model_that_llama_cpp_does_not_know_is_refused(
    family: str, overrides: dict[str, Any], message: str, tmp_path: Path
) -> None:
    source = opened(tmp_path / "source", Grid(4, 32), family=family, **overrides)
    with pytest.raises(UserError, match=f"export.format gguf {message}"):
        check_format("gguf", Scheme("W4A16g32"), source=source)


def test_check_tokenizer_with_unknown_rule_is_refused(source: SourceModel) -> None:
    from tokenizers import pre_tokenizers

    source.tokenizer().backend_tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    with pytest.raises(UserError, match="the tokenizer splits a text by the rule .*Whitespace.*, which has no name"):
        check_format("gguf", Scheme("W4A16g32"), source=source)


BIASES = {"attention_bias": True, "mlp_bias": True}


@pytest.mark.parametrize(
    ("family", "overrides"),
    [
        ("llama", {"tie_word_embeddings": True}),
        ("llama", BIASES),
        ("mistral", {}),
        ("qwen2", {}),
        ("qwen3", {}),
        ("llama", {"rope_parameters": {"rope_type": "linear", "rope_theta": 1e4, "factor": 2.0}}),
    ],
)
@pytest.mark.parametrize("grid", [Grid(4, 32, True), Grid(4, 64)])
def test_export_reopened_in_transformers_has_the_same_logits(
    grid: Grid, family: str, overrides: dict[str, Any], tmp_path: Path
) -> None:
    source = opened(tmp_path / "source", grid, family=family, **overrides)
    results = rounded(source, grid)
    out = export(source, results, tmp_path / "out", format="gguf")
    report = verify(out, source, results, format="gguf", windows=WINDOWS, tolerance=0.0)
    assert (report.lacking, report.relative_error, report.windows) == (None, 0.0, 2)
    assert sorted(path.name for path in out.iterdir()) == [
        ".omniq-export.json",
        "README.md",
        "model.gguf",
        "recipe.yaml",
    ]
    assert "llama-cli -m out/model.gguf" in (out / "README.md").read_text()


def test_export_q2_0_is_verified_block_by_block(tmp_path: Path) -> None:
    grid = Grid(2, 64, True)
    source = opened(tmp_path / "source", grid)
    results = rounded(source, grid)
    out = export(source, results, tmp_path / "out", format="gguf")
    report = verify(out, source, results, format="gguf", windows=WINDOWS, tolerance=0.0)
    assert report.lacking == "transformers does not read blocks of type Q2_0"
    with GgufReader(out / "model.gguf") as file:
        assert file.tensors["blk.1.attn_q.weight"].type == Q2_0.number
        assert file.metadata["general.file_type"].value == 41


def test_export_twice_writes_the_same_bytes(source: SourceModel, results: list[BlockResult], tmp_path: Path) -> None:
    first, second = (export(source, results, tmp_path / name, format="gguf") for name in ("a", "b"))
    assert (first / "model.gguf").read_bytes() == (second / "model.gguf").read_bytes()


def test_export_rows_of_queries_and_keys_follow_llama_cpp(
    source: SourceModel, results: list[BlockResult], tmp_path: Path
) -> None:
    """``LlamaModel.permute`` of llama.cpp's converter, in numpy."""
    out = export(source, results, tmp_path / "out", format="gguf")
    found = {tensor.name: tensor for tensor in gguf.GGUFReader(out / "model.gguf").tensors}
    for name, theirs, heads in (("q_proj", "attn_q", 4), ("k_proj", "attn_k", 2)):
        weight = results[1].linears[f"self_attn.{name}"].dequantize().numpy()
        expected = weight.reshape(heads, 2, -1, 64).swapaxes(1, 2).reshape(weight.shape)
        tensor = found[f"blk.1.{theirs}.weight"]
        assert np.array_equal(gguf.quants.dequantize(tensor.data, tensor.tensor_type), expected)


def test_export_tokenizer_read_back_by_transformers_gives_the_same_tokens(
    source: SourceModel, results: list[BlockResult], tmp_path: Path
) -> None:
    out = export(source, results, tmp_path / "out", format="gguf")
    text = "A weight, 12 scales: é\n"
    found = AutoTokenizer.from_pretrained(out, gguf_file="model.gguf")
    assert found(text).input_ids == tiny_tokenizer()(text).input_ids
    with GgufReader(out / "model.gguf") as file:
        tokens, types = (file.metadata[f"tokenizer.ggml.{key}"].decoded() for key in ("tokens", "token_type"))
    assert (tokens[256:259], types[255:259]) == (["<s>", "</s>", "[PAD258]"], [1, 3, 3, 5])


def test_rope_factors_of_llama3_divide_the_frequencies() -> None:
    """The formula of ``convert_hf_to_gguf.py``, in float64."""
    from transformers import LlamaConfig

    rope = {"rope_type": "llama3", "rope_theta": 5e5, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
    rope["original_max_position_embeddings"] = 8192
    config = LlamaConfig(hidden_size=512, num_attention_heads=4, max_position_embeddings=131072, rope_parameters=rope)
    expected = []
    for k in range(0, 128, 2):
        length = 2 * np.pi * 5e5 ** (k / 128)
        smooth = (8192 / length - 1.0) / 3.0
        middle = 1 / ((1 - smooth) / 8.0 + smooth) if smooth not in (1.0, 0.0) else 1.0
        expected.append(1.0 if length < 8192 / 4 else 8.0 if length > 8192 else middle)
    found = rope_factors(config)
    assert found is not None
    assert np.allclose(found.numpy(), expected, rtol=1e-5)  # measured: 3e-7


@needs_smol
def test_export_of_gguf_source_copies_its_metadata(tmp_path: Path) -> None:
    source = SourceModel.open(SMOL)
    grid = Grid(4, 32, True)
    results = rounded(source, grid)
    out = export(source, results, tmp_path / "out", format="gguf")
    verify(out, source, results, format="gguf")
    assert source.gguf_file is not None
    with GgufReader(source.gguf_file) as given, GgufReader(out / "model.gguf") as file:
        changed = {key for key in given.metadata if given.metadata[key] != file.metadata[key]}
        assert changed == {"general.file_type"}
        ours = {key: value.decoded() for key, value in config_metadata(source.config, "").items()}
        theirs = {key: value.decoded() for key, value in given.metadata.items()}
    same = [key for key in ours if key in theirs and key != "general.name"]
    assert len(same) == 12
    assert all(ours[key] == pytest.approx(theirs[key], rel=1e-6) for key in same if not isinstance(ours[key], str))
    assert all(ours[key] == theirs[key] for key in same if isinstance(ours[key], str))


# -- damaged files ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda data: b"", "cannot mmap an empty file"),
        (lambda data: b"PK" + data[2:], r"model\.gguf is not a GGUF file: it starts with b'PKUF'"),
        (lambda data: data[:4] + b"\x09" + data[5:], "has version 9 of the GGUF format, which is not 3"),
        (lambda data: data[:300], r"model\.gguf is truncated, or its header is damaged"),
        (lambda data: data[:-40_000], r"model\.gguf is truncated: .* ends at byte \d+ of \d+"),
    ],
)
def test_verify_damaged_gguf_is_named(
    change: Any, message: str, source: SourceModel, results: list[BlockResult], tmp_path: Path
) -> None:
    out = export(source, results, tmp_path / "out", format="gguf")
    file = out / "model.gguf"
    file.write_bytes(change(file.read_bytes()))
    with pytest.raises(CorruptFile, match=message):
        verify(out, source, results, format="gguf")


def test_verify_random_damage_of_gguf_raises_only_own_errors(
    source: SourceModel, results: list[BlockResult], tmp_path: Path
) -> None:
    out = export(source, results, tmp_path / "out", format="gguf")
    file, generator, caught = out / "model.gguf", random.Random(0), 0
    whole = file.read_bytes()
    for _ in range(100):
        damaged = bytearray(whole)
        damaged[generator.randrange(len(whole) if caught % 2 else 1500)] ^= 1 << generator.randrange(8)
        file.write_bytes(damaged)
        try:
            verify(out, source, results, format="gguf")
        except (CorruptFile, VerificationError):
            caught += 1
    assert caught >= 50
