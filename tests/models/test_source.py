# SPDX-License-Identifier: Apache-2.0
"""Models opened block by block equal the whole model of transformers; only requested tensors are read."""

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

from omniq.errors import UserError
from omniq.models import checkpoint
from omniq.models.meta import fill, meta_model
from omniq.models.source import SourceModel
from omniq.models.weight_files import INDEX
from tests.helpers.opening import edit_json, stream, tokens
from tests.helpers.tiny import save_tiny, tiny_model

SLIDING = {"use_sliding_window": True, "sliding_window": 5, "max_window_layers": 1}
MODELS: list[tuple[str, dict[str, Any]]] = [
    ("llama", {"num_key_value_heads": 4}),
    ("llama", {"num_key_value_heads": 2, "num_hidden_layers": 3}),
    ("llama", {"num_key_value_heads": 1, "tie_word_embeddings": True}),
    ("llama", {"attention_bias": True, "mlp_bias": True}),
    ("llama", {"head_dim": 8, "rope_parameters": {"rope_type": "linear", "factor": 4.0, "rope_theta": 1e4}}),
    ("mistral", {}),
    ("mistral", {"sliding_window": 5}),
    ("qwen2", {}),
    ("qwen2", {**SLIDING, "layer_types": ["full_attention", "sliding_attention"]}),
    ("qwen3", {"tie_word_embeddings": True}),
    ("phi3", {}),
    ("phi3", {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.5}}),
    ("gemma", {"tie_word_embeddings": True}),
    ("gemma3_text", {"layer_types": ["full_attention", "sliding_attention"]}),
    ("opt", {}),
    ("opt", {"do_layer_norm_before": False, "word_embed_proj_dim": 32}),
    ("granite", {}),
    ("smollm3", {}),
    ("olmo2", {}),
    ("olmo3", {"layer_types": ["full_attention", "sliding_attention"]}),
    ("gpt_neox", {}),
    ("gpt_neox", {"use_parallel_residual": False}),
    ("gemma2", {"layer_types": ["full_attention", "sliding_attention"]}),
    ("bloom", {"tie_word_embeddings": True}),
    ("falcon", {}),
    ("falcon", {"new_decoder_architecture": True, "num_kv_heads": 2}),
    ("falcon", {"alibi": True, "multi_query": False, "parallel_attn": False}),
    ("opt", {"word_embed_proj_dim": 32, "tie_word_embeddings": True}),
    ("opt", {"enable_bias": False, "_remove_final_layer_norm": True}),
]


@torch.no_grad()
def whole(folder: Path, ids: Tensor, attention: str = "sdpa", dtype: str = "auto", device: str = "cpu") -> Tensor:
    """Logits of the model as transformers loads and runs it."""
    model = AutoModelForCausalLM.from_pretrained(folder, attn_implementation=attention, dtype=dtype).to(device)
    logits: Tensor = model(ids.to(device)).logits
    return logits


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize(("family", "overrides"), MODELS)
def test_source_model_blocks_one_by_one_equal_whole_model(
    tmp_path: Path, family: str, overrides: dict[str, Any], attention: str
) -> None:
    folder = save_tiny(tmp_path, family, **overrides)
    source = SourceModel.open(folder, attention=attention)
    attention = "eager" if family in ("bloom", "gemma2") else attention  # the only one that they have
    assert source.config._attn_implementation == attention
    difference = stream(source, tokens()) - whole(folder, tokens(), attention)
    assert difference.abs().max() <= 1e-6  # measured: 0 for all


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
@pytest.mark.parametrize("family", ["llama", "opt"])
def test_source_model_in_each_dtype_equals_whole_model(tmp_path: Path, family: str, dtype: str) -> None:
    folder = save_tiny(tmp_path, family, dtype=torch.float16)
    source = SourceModel.open(folder, dtype=dtype)
    assert source.dtype == source.config.dtype == getattr(torch, dtype)
    logits = stream(source, tokens())
    assert logits.dtype == source.dtype
    assert torch.equal(logits, whole(folder, tokens(), dtype=dtype))
    assert {value.dtype for _, value in source.outside()} == {source.dtype}
    assert next(source.block(0, dtype=torch.float64).parameters()).dtype == torch.float64


def test_source_model_auto_dtype_is_that_of_config_or_of_weights(tmp_path: Path) -> None:
    folder = save_tiny(tmp_path, dtype=torch.bfloat16)
    assert SourceModel.open(folder).dtype == torch.bfloat16
    edit_json(folder / "config.json", dtype=None)
    assert SourceModel.open(folder).dtype == torch.bfloat16


def test_embed_recorded_arguments_serve_any_batch(tmp_path: Path) -> None:
    for attention in ("sdpa", "eager"):
        source = SourceModel.open(save_tiny(tmp_path / attention), attention=attention)
        hidden, kwargs = source.embed(tokens(5))
        assert hidden.shape == (5, 20, 64)
        assert len(kwargs) == source.num_blocks == 2
        tensors = [value for entry in kwargs for value in entry.values() if isinstance(value, Tensor)]
        assert tensors
        assert all(value.shape[0] == 1 for value in tensors)
        assert all(entry["past_key_values"] is None for entry in kwargs)
        block = source.block(0)
        one_by_one = torch.cat([block(sample[None], **kwargs[0]) for sample in hidden])
        assert torch.allclose(block(hidden, **kwargs[0]), one_by_one, atol=1e-6)  # measured: 2e-7
        block(hidden.requires_grad_(), **kwargs[0]).sum().backward()  # the arguments allow gradients
        assert hidden.grad is not None


def test_embed_for_flash_attention_omits_positions(tmp_path: Path) -> None:
    """With several samples flash attention would read the positions in each call, and the host would wait."""
    for attention in ("sdpa", "flash_attention_2"):
        source = SourceModel.open(save_tiny(tmp_path / attention))
        source.config._attn_implementation = attention
        _, kwargs = source.embed(tokens(5))
        assert all(("position_ids" in entry) == (attention == "sdpa") for entry in kwargs)
        assert all(entry["position_embeddings"][0].shape[:2] == (1, 20) for entry in kwargs)


def test_embed_many_tokens_in_parts_gives_same_hidden_states(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = SourceModel.open(save_tiny(tmp_path))
    together, _ = source.embed(tokens(7))
    monkeypatch.setattr("omniq.models.embedding_and_head._TOKENS_AT_ONCE", 45)
    in_parts, _ = source.embed(tokens(7))
    assert torch.equal(together, in_parts)


def test_source_model_sharded_equals_single_file(tmp_path: Path) -> None:
    single, sharded = save_tiny(tmp_path / "single"), save_tiny(tmp_path / "sharded", max_shard_size="60KB")
    assert (sharded / INDEX).exists()
    expected = stream(SourceModel.open(single), tokens())
    for dtype in ("float16", "bfloat16"):
        cast = SourceModel.open(single).in_dtype(getattr(torch, dtype))
        assert torch.equal(stream(cast, tokens()), stream(SourceModel.open(single, dtype=dtype), tokens()))
    assert torch.equal(stream(SourceModel.open(sharded), tokens()), expected)
    assert torch.equal(stream(SourceModel.open(single / "model.safetensors"), tokens()), expected)


def test_source_model_block_reads_own_tensors_only(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    read: list[str] = []

    class Spy:
        def __init__(self, *args: Any) -> None:
            self.opened = original(*args)

        def __enter__(self) -> "Spy":
            return self

        def __exit__(self, *args: Any) -> None:
            self.opened.__exit__(*args)

        def get_tensor(self, name: str) -> Tensor:
            read.append(name)
            return self.opened.get_tensor(name)

        def __getattr__(self, name: str) -> Any:
            return getattr(self.opened, name)

    original = checkpoint.safe_open
    monkeypatch.setattr(checkpoint, "safe_open", Spy)
    source = SourceModel.open(save_tiny(tmp_path, max_shard_size="60KB"))
    assert read == []  # opening reads headers only
    block = source.block(1)
    assert sorted(read) == sorted(f"model.layers.1.{name}" for name in block.state_dict())
    read.clear()
    source.embed(tokens())
    assert sorted(read) == ["model.embed_tokens.weight", "model.norm.weight"]
    read.clear()
    source.logits(torch.zeros(1, 4, 64))
    source.logits(torch.zeros(1, 4, 64))
    assert read == ["lm_head.weight"]
    source.release()
    source.logits(torch.zeros(1, 4, 64))
    source.embed(tokens())
    assert read == ["lm_head.weight", "lm_head.weight", "model.embed_tokens.weight"]


def test_source_model_block_is_new_and_frozen_with_own_config(tmp_path: Path) -> None:
    source = SourceModel.open(save_tiny(tmp_path))
    first, second = source.block(1), source.block(1)
    assert source.block_name(1) == "model.layers.1"
    assert not first.training
    assert not any(value.requires_grad for value in first.parameters())
    assert first.self_attn.layer_idx == 1
    assert first.self_attn.config is not source.config
    assert all(value.data_ptr() % 64 == 0 for value in first.parameters())  # out of the mapped file, aligned
    with torch.no_grad():
        first.mlp.up_proj.weight.zero_()
    again = source.block(1)
    for name, value in second.state_dict().items():
        assert torch.equal(value, again.state_dict()[name])


@pytest.mark.parametrize("tied", [True, False])
def test_source_model_outside_names_parameters_of_no_block(tmp_path: Path, tied: bool) -> None:
    folder = save_tiny(tmp_path, "opt", tie_word_embeddings=tied, word_embed_proj_dim=32)
    model = AutoModelForCausalLM.from_pretrained(folder)
    found = dict(SourceModel.open(folder).outside())
    expected = [name for name, _ in model.named_parameters() if not name.startswith("model.decoder.layers.")]
    assert sorted(found) == sorted(expected)
    assert ("lm_head.weight" in found) == (not tied)
    assert all(torch.equal(value, model.get_parameter(name)) for name, value in found.items())


@pytest.mark.parametrize("stored", ["both", "different", "head only", "short names"])
def test_source_model_tied_embeddings_in_each_storage_are_read(
    tmp_path: Path, stored: str, caplog: pytest.LogCaptureFixture
) -> None:
    folder = save_tiny(tmp_path, tie_word_embeddings=True)
    file = folder / "model.safetensors"
    tensors = load_file(file)
    table = tensors["model.embed_tokens.weight"]
    if stored == "short names":
        tensors = {name.removeprefix("model."): value for name, value in tensors.items()}
    else:
        tensors["lm_head.weight"] = table + (stored == "different")
        if stored == "head only":
            del tensors["model.embed_tokens.weight"]
    save_file(tensors, file, metadata={"format": "pt"})
    source = SourceModel.open(folder)
    assert torch.equal(stream(source, tokens()), whole(folder, tokens()))
    different = stored == "different"
    assert source.config.tie_word_embeddings == (not different)
    assert ("differs from" in caplog.text) == different
    names = ["model.embed_tokens.weight", "model.norm.weight", *(["lm_head.weight"] if different else [])]
    assert [name for name, _ in source.outside()] == names


def test_source_model_digest_depends_on_content_not_place(tmp_path: Path) -> None:
    folder = save_tiny(tmp_path / "a", max_shard_size="60KB")
    digest = SourceModel.open(folder).digest()
    shutil.copytree(folder, tmp_path / "b")
    assert SourceModel.open(tmp_path / "b").digest() == digest
    edit_json(tmp_path / "b" / "config.json", rms_norm_eps=1e-3)
    assert SourceModel.open(tmp_path / "b").digest() != digest
    shard = sorted(folder.glob("*.safetensors"))[0]
    content = bytearray(shard.read_bytes())
    content[-1] ^= 1
    shard.write_bytes(content)
    assert SourceModel.open(folder).digest() != digest


def test_source_model_tokenizer_is_read_or_refused(tmp_path: Path) -> None:
    folder = save_tiny(tmp_path)
    tokenizer = SourceModel.open(folder).tokenizer()
    assert tokenizer.decode(tokenizer("one line\n")["input_ids"]) == "one line\n"
    for file in folder.glob("tokenizer*"):
        file.unlink()
    with pytest.raises(UserError, match=r"no tokenizer can be read from .*: put its files there"):
        SourceModel.open(folder).tokenizer()


def test_fill_uninitialised_buffer_is_refused() -> None:
    class Odd(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("table", torch.arange(3.0), persistent=False)

    model = meta_model(tiny_model().config, torch.float32, "sdpa")
    with torch.device("meta"):
        odd = Odd()
    with pytest.raises(UserError, match=r"LlamaForCausalLM does not initialise Odd\.table"):
        fill(model, odd, {}, torch.device("cpu"))


@pytest.mark.gpu
@pytest.mark.parametrize("family", ["llama", "opt"])
def test_source_model_on_cuda_equals_whole_model(tmp_path: Path, family: str) -> None:
    folder = save_tiny(tmp_path, family, dtype=torch.float16)
    source = SourceModel.open(folder)
    logits = stream(source, tokens(), "cuda")
    assert logits.device.type == "cuda"
    assert torch.equal(logits, whole(folder, tokens(), device="cuda"))
