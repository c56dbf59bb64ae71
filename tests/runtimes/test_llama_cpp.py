# SPDX-License-Identifier: Apache-2.0
"""Exports in format gguf, in llama.cpp itself (``make runtimes``)."""

import ctypes
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer, normalizers
from tokenizers.models import BPE
from tokenizers.processors import TemplateProcessing
from tokenizers.trainers import BpeTrainer
from torch import Tensor
from transformers import PreTrainedTokenizerFast

from omniq.export import find_format
from omniq.export.containers import gguf_model
from omniq.export.formats.ggml import Ggml
from omniq.export.verify.reference import Distance, reference_logits
from omniq.export.verify.runtimes import RUNTIMES
from omniq.grid.affine import Grid
from omniq.models.source import SourceModel
from omniq.storage.block_result import QuantizedLinear
from tests.helpers.exported import export, opened, rounded
from tests.helpers.opening import SMOL, needs_smol
from tests.helpers.runs import WORDS
from tests.helpers.schemes import scheme_of
from tests.helpers.tiny import save_tiny

xllamacpp = pytest.importorskip("xllamacpp", reason="pip install 'omniq[gguf]'")
LLAMA_CPP = next(runtime for runtime in RUNTIMES if runtime.name == "llama.cpp")
LLAMA3 = {"rope_type": "llama3", "rope_theta": 1e4, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}


def distance(out: Path, grid: Grid, tokens: Tensor) -> Distance:
    """Between llama.cpp and omniq's reference."""
    chosen, scheme = find_format("gguf"), scheme_of(grid)
    with chosen.container.read(out, chosen.codec(scheme)) as reader:
        expected = reference_logits(reader, scheme, tokens, out)
    return Distance.of(LLAMA_CPP.log_probabilities(out, tokens), expected)


@pytest.mark.parametrize(
    ("function", "grid"),
    [
        ("q2_0", Grid(2, 64, True)),
        ("q4_0", Grid(4, 32, True)),
        ("q4_0", Grid(3, 64)),
        ("q5_0", Grid(4, 64)),
        ("q8_0", Grid(8, -1, True)),
    ],
)
def test_blocks_dequantized_by_llama_cpp_equal_weights(function: str, grid: Grid) -> None:
    generator = torch.Generator().manual_seed(0)
    codes = torch.randint(0, grid.max_code + 1, (64, 512), generator=generator)
    shape = (64, grid.groups(512))
    zero_point = torch.randint(0, grid.max_code + 1, shape, generator=generator)
    zero_point = torch.full(shape, 2 ** (grid.bits - 1)) if grid.symmetric else zero_point
    linear = QuantizedLinear.of(grid, codes, torch.rand(shape, generator=generator) + 0.01, zero_point)
    [data] = Ggml(scheme_of(grid)).store("x", linear).values()
    found = np.empty((64, 512), np.float32)
    dequantize = getattr(ctypes.CDLL(xllamacpp.xllamacpp.__file__), f"dequantize_row_{function}")
    source = np.ascontiguousarray(data.numpy())
    pointers = (array.ctypes.data_as(ctypes.c_void_p) for array in (source, found))
    dequantize(*pointers, ctypes.c_int64(found.size))
    assert np.abs(found - linear.dequantize().numpy()).max() == 0.0


@pytest.mark.parametrize(
    ("family", "overrides"),
    [
        ("llama", {}),
        ("llama", {"tie_word_embeddings": True, "attention_bias": True, "mlp_bias": True}),
        ("llama", {"rope_parameters": {**LLAMA3, "original_max_position_embeddings": 16}}),
        ("llama", {"rope_parameters": {"rope_type": "linear", "rope_theta": 1e4, "factor": 4.0}}),
        ("mistral", {}),
        ("qwen2", {}),
        ("qwen3", {"head_dim": 32}),
    ],
)
def test_tiny_model_in_llama_cpp_has_the_same_logits(family: str, overrides: dict[str, Any], tmp_path: Path) -> None:
    """Blocks of 8 bits: llama.cpp rounds the inputs of each linear to 8 bits too."""
    grid = Grid(8, 32, True)
    source = opened(tmp_path / "source", grid, family=family, **overrides)
    out = export(source, rounded(source, grid), tmp_path / "out", format="gguf")
    found = distance(out, grid, torch.arange(60, 76))
    assert found.divergence < 5e-4  # measured: 5e-5 to 9e-5


def test_rows_in_the_order_of_transformers_give_other_logits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The tolerance above can fail."""
    grid = Grid(8, 32, True)
    source = opened(tmp_path / "source", grid)
    monkeypatch.setattr(gguf_model, "row_order", lambda *_: None)
    out = export(source, rounded(source, grid), tmp_path / "out", format="gguf")
    assert distance(out, grid, torch.arange(60, 76)).divergence > 5e-3


def sentencepiece_tokenizer() -> PreTrainedTokenizerFast:
    """Built like that of LLaMA 2: BPE on characters with bytes for unknown ones, and a space before the text."""
    merged = Tokenizer(BPE())
    normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    merged.normalizer = normalizer
    words = [f"{word} and {word}s, the {word}ing of {word}" for word in WORDS]
    merged.train_from_iterator(words, BpeTrainer(vocab_size=160, show_progress=False))
    model = json.loads(merged.to_str())["model"]
    first = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    tokens = [*first, *sorted(model["vocab"], key=model["vocab"].get)]
    vocabulary = {token: index for index, token in enumerate(tokens)}
    tokenizer = Tokenizer(
        BPE(vocabulary, [tuple(pair) for pair in model["merges"]], unk_token="<unk>", byte_fallback=True, fuse_unk=True)
    )
    tokenizer.normalizer = normalizer
    tokenizer.post_processor = TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", unk_token="<unk>")


def completions(out: Path, prompt: Any) -> Any:
    """The probabilities after a prompt, which is a text or tokens."""
    params = xllamacpp.CommonParams()
    params.model.path, params.n_ctx, params.n_parallel, params.verbosity = str(out / "model.gguf"), 256, 1, -1
    options = {"max_tokens": 1, "temperature": 0, "n_probs": 50, "ignore_eos": True}
    answer = xllamacpp.Server(params).handle_completions({"prompt": prompt, **options})
    return answer["usage"]["prompt_tokens"], answer["choices"][0]["logprobs"]


def test_sentencepiece_tokenizer_in_llama_cpp_gives_the_same_tokens(tmp_path: Path) -> None:
    grid, tokenizer = Grid(8, 32, True), sentencepiece_tokenizer()
    save_tiny(tmp_path / "source", dtype=grid.scale_dtype, vocab_size=len(tokenizer), bos_token_id=1, eos_token_id=2)
    tokenizer.save_pretrained(tmp_path / "source")
    source = SourceModel.open(tmp_path / "source")
    out = export(source, rounded(source, grid), tmp_path / "out", format="gguf")
    for text in ("the quantized block and scales, learned", "  é weighting  codes"):
        tokens = source.tokenizer()(text).input_ids
        assert completions(out, text) == completions(out, tokens)
        assert completions(out, text)[0] == len(tokens)


@needs_smol
@pytest.mark.slow
@pytest.mark.parametrize("grid", [Grid(4, 32, True), Grid(4, 64), Grid(3, 64)])
def test_smollm2_in_llama_cpp_answers(grid: Grid, tmp_path: Path) -> None:
    source = SourceModel.open(SMOL)
    out = export(source, rounded(source, grid), tmp_path / "out", format="gguf")
    prompt = "The capital of France is"
    tokens = source.tokenizer()(prompt, return_tensors="pt").input_ids[0]
    found = distance(out, grid, tokens)
    assert found.divergence < 0.05
    params = xllamacpp.CommonParams()
    params.model.path, params.n_ctx, params.verbosity = str(out / "model.gguf"), 256, -1
    server = xllamacpp.Server(params)
    asked = [
        server.handle_completions({"prompt": given, "max_tokens": 12, "temperature": 0})
        for given in (prompt, tokens.tolist())
    ]
    texts = [answer["choices"][0]["text"] for answer in asked]
    assert texts[0] == texts[1]  # llama.cpp gives the text the same tokens as transformers does
    assert "Paris" in texts[0]
