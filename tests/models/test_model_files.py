# SPDX-License-Identifier: Apache-2.0
"""Model files are read on demand; damaged or missing ones are refused in one line with file and remedy."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from omniq.errors import UserError
from omniq.models.checkpoint import SafetensorsCheckpoint
from omniq.models.source import SourceModel
from omniq.models.weight_files import INDEX
from tests.helpers.opening import edit_json, refused, stream, tokens
from tests.helpers.tiny import VOCAB_SIZE, save_tiny, tiny_model


def test_safetensors_checkpoint_reads_all_tensors(tmp_path: Path) -> None:
    folder = save_tiny(tmp_path, max_shard_size="60KB")
    opened = SafetensorsCheckpoint(folder, INDEX)
    expected = tiny_model().state_dict()
    assert {name: stored.shape for name, stored in opened.tensors.items()} == {
        k: tuple(v.shape) for k, v in expected.items()
    }
    assert all(torch.equal(value, expected[name]) for name, value in opened.read(expected).items())


def test_open_missing_or_broken_shards_are_refused(tmp_path: Path) -> None:
    folder = save_tiny(tmp_path, max_shard_size="60KB")
    shard = sorted(folder.glob("*.safetensors"))[3]
    content = shard.read_bytes()
    for broken in (content[:-8], content[:20], b"", b"garbage" * 100):
        shard.write_bytes(broken)
        refused(folder, rf"{shard.name} is truncated or corrupt \(.*\): get the file again")
    shard.unlink()
    refused(folder, rf"{shard.name} is missing: get the file again")
    save_file({"something": torch.zeros(1)}, shard)
    refused(folder, rf"{shard.name} lacks the tensor model\..* that {INDEX} lists")
    (folder / INDEX).write_text("{")
    refused(folder, rf"{INDEX} is not valid JSON")
    for content in ("{}", '{"weight_map": {}}', '{"weight_map": {"model.norm.weight": 3}}'):
        (folder / INDEX).write_text(content)
        refused(folder, rf"{INDEX} has no weight_map of file names: get the file again")
    (folder / INDEX).unlink()
    refused(folder, f"holds several safetensors files and no {INDEX}")


def test_open_missing_or_broken_config_is_refused(tmp_path: Path) -> None:
    folder = save_tiny(tmp_path)
    config = folder / "config.json"
    good = config.read_text()
    edit_json(config, model_type="nope")
    refused(folder, "model type 'nope' is not supported, because transformers .* does not know it: update transformers")
    config.write_text("{}")
    refused(folder, "model type None is not supported")
    config.write_text(good)
    edit_json(config, quantization_config={"quant_method": "gptq", "bits": 4})
    refused(folder, r"the model is quantized already \(gptq\): give the model it was made from")
    config.write_text(good)
    edit_json(config, num_attention_heads="four")
    refused(folder, r"config.json cannot be read as a config of transformers \(.*\): get the file again")
    config.write_text(good[:30])
    refused(folder, "config.json is not valid JSON")
    config.write_text("[]")
    refused(folder, "config.json does not hold a JSON object")
    config.unlink()
    refused(folder, r"config.json cannot be read \(No such file or directory\): a model folder needs it")


def test_open_weights_not_fitting_config_are_refused(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    folder = save_tiny(tmp_path)
    config = folder / "config.json"
    edit_json(config, num_hidden_layers=3)
    refused(folder, r"lacks 9 parameters that its config asks for, such as model\.layers\.2\.")
    edit_json(config, num_hidden_layers=2, intermediate_size=96)
    refused(folder, r"mlp.gate_proj.weight has shape \[128, 64\], but the config asks for \[96, 64\]")
    edit_json(config, num_hidden_layers=1, intermediate_size=128)
    assert SourceModel.open(folder).num_blocks == 1
    assert "stores 9 tensors the model does not use, such as model.layers.1." in caplog.text


def test_open_unknown_settings_are_refused(tmp_path: Path) -> None:
    folder = save_tiny(tmp_path)
    refused(folder, "model.dtype 'int8' is unknown: choose auto, float16, bfloat16, float32", dtype="int8")
    refused(folder, r"model.attention 'fast' \(.*\): use sdpa or eager", attention="fast")


def test_embed_tokens_outside_model_limits_are_refused(tmp_path: Path) -> None:
    source = SourceModel.open(save_tiny(tmp_path))
    with pytest.raises(UserError, match=f"token 272 is outside the model's vocabulary of {VOCAB_SIZE}"):
        source.embed(torch.tensor([[3, 272]]))
    with pytest.raises(UserError, match="samples of 129 tokens exceed the model's 128 positions"):
        source.embed(tokens(1, 129))


def test_open_remote_code_is_not_run(tmp_path: Path) -> None:
    folder, marker = save_tiny(tmp_path / "model"), tmp_path / "ran"
    code = f"open({str(marker)!r}, 'w')\nfrom transformers import LlamaForCausalLM as Mine\n"
    (folder / "modeling_mine.py").write_text(code)
    edit_json(folder / "config.json", auto_map={"AutoModelForCausalLM": "modeling_mine.Mine"})
    stream(SourceModel.open(folder), tokens())
    edit_json(folder / "config.json", model_type="mine")
    refused(folder, "model type 'mine' is not supported")
    assert not marker.exists()
