# SPDX-License-Identifier: Apache-2.0
"""omniq reads the weight files that transformers reads, and refuses ambiguous and foreign ones by name."""

import json
import os
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from omniq.errors import UserError
from omniq.grid.affine import Grid
from omniq.models.source import SourceModel
from omniq.models.transformers_io import open_weights
from omniq.models.weight_files import INDEX, SINGLE, weight_file
from tests.helpers.exported import export, rounded
from tests.helpers.opening import edit_json, refused, stream, tokens
from tests.helpers.tiny import save_tiny

SHARDS = "60KB"


@torch.no_grad()
def same_as_transformers(folder: Path) -> bool:
    """Whether omniq reads the weights that transformers reads."""
    whole = AutoModelForCausalLM.from_pretrained(folder)(tokens()).logits
    return torch.equal(stream(SourceModel.open(folder), tokens()), whole)


def shards(folder: Path) -> list[Path]:
    return sorted(folder.glob("model-*.safetensors"))


def rename_shard(folder: Path, name: str) -> Path:
    """Let the index name its first shard otherwise; return the shard, which is not moved."""
    index, shard = folder / INDEX, shards(folder)[0]
    listed = json.loads(index.read_text())
    listed["weight_map"] = {k: name if v == shard.name else v for k, v in listed["weight_map"].items()}
    index.write_text(json.dumps(listed))
    return shard


def test_weight_file_two_models_in_folder_are_refused_by_name(tmp_path: Path) -> None:
    folder, newer = save_tiny(tmp_path / "a", max_shard_size=SHARDS), save_tiny(tmp_path / "b", seed=5)
    shutil.copy(newer / SINGLE, folder)
    refused(folder, rf"holds two models, {SINGLE} and {INDEX} with 9 of its shards, such as model-00001-of-00009")
    with pytest.raises(UserError, match="holds two models"):
        open_weights(folder)
    expected = stream(SourceModel.open(newer), tokens())
    assert torch.equal(stream(SourceModel.open(folder / SINGLE), tokens()), expected)
    shards(folder)[0].unlink()  # one shard less is still another model
    refused(folder, "holds two models, .* with 8 of its shards")


def test_weight_file_index_without_shards_is_ignored(tmp_path: Path) -> None:
    folder, newer = save_tiny(tmp_path / "a", max_shard_size=SHARDS), save_tiny(tmp_path / "b", seed=5)
    for shard in shards(folder):
        shard.unlink()
    refused(folder, r"model-00001-of-00009.safetensors is missing")
    shutil.copy(newer / SINGLE, folder)
    assert weight_file(folder) == SINGLE
    assert same_as_transformers(folder)


def test_weight_file_index_of_single_file_is_no_second_model(tmp_path: Path) -> None:
    folder = save_tiny(tmp_path)
    listed = {"metadata": {}, "weight_map": dict.fromkeys(load_file(folder / SINGLE), SINGLE)}
    (folder / INDEX).write_text(json.dumps(listed))
    assert same_as_transformers(folder)


def test_weight_file_tensor_in_two_shards_is_refused_with_both(tmp_path: Path) -> None:
    folder = save_tiny(tmp_path, max_shard_size=SHARDS)
    first, second = shards(folder)[:2]
    for source, target in ((first, second), (second, first)):  # the index names either of the two
        plain = target.read_bytes()
        save_file(load_file(target) | load_file(source), target, metadata={"format": "pt"})
        refused(folder, f"{first.name} and .*{second.name} both hold the tensor")
        target.write_bytes(plain)


@pytest.mark.parametrize("sharded", [False, True])
def test_weight_file_named_by_config_is_read(tmp_path: Path, sharded: bool) -> None:
    folder, other = save_tiny(tmp_path / "a"), save_tiny(tmp_path / "b", seed=5, max_shard_size=SHARDS)
    name = f"other.{INDEX.partition('.')[2]}" if sharded else "other.safetensors"
    if sharded:
        shutil.copy(other / INDEX, folder / name)
        for shard in shards(other):
            shutil.copy(shard, folder)
    else:
        shutil.copy(save_tiny(tmp_path / "c", seed=5) / SINGLE, folder / name)
    edit_json(folder / "config.json", transformers_weights=name)
    assert same_as_transformers(folder)
    source = SourceModel.open(folder)
    assert torch.equal(stream(source, tokens()), stream(SourceModel.open(other), tokens()))
    assert "transformers_weights" not in source.config.to_dict()
    assert "transformers_weights" not in source.in_dtype(torch.float16).config.to_dict()
    open_weights(folder)  # its own check accepts the file too
    refused(folder / SINGLE, f"model.path names {SINGLE}, but transformers_weights in .* names {name}: remove that key")


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("gone.safetensors", r"gone.safetensors is missing"),
        ("../b/model.safetensors", r"names the weight file '../b/model.safetensors', which is not inside"),
        ("model.gguf", r"transformers_weights 'model.gguf' is not the name of a safetensors file or index"),
        (3, r"transformers_weights 3 is not the name of a safetensors file or index: remove that key"),
        ("weights.bin", r"weights.bin is a pickle file"),
    ],
)
def test_weight_file_named_by_config_but_unusable_is_refused(tmp_path: Path, name: object, text: str) -> None:
    save_tiny(tmp_path / "b")
    folder = save_tiny(tmp_path / "a")
    edit_json(folder / "config.json", transformers_weights=name)
    refused(folder, text)


@pytest.mark.parametrize("kind", ["parent", "absolute", "link", "linked folder", "loop", "no name"])
def test_weight_file_index_leaving_folder_is_refused(tmp_path: Path, kind: str) -> None:
    folder, outside = save_tiny(tmp_path / "a", max_shard_size=SHARDS), tmp_path / "outside"
    outside.mkdir()
    names = {
        "parent": "../outside/x.safetensors",
        "absolute": str(outside / "x.safetensors"),
        "link": "x.safetensors",
        "linked folder": "inner/x.safetensors",
        "loop": "loop.safetensors",
        "no name": "x\0.safetensors",
    }
    shutil.move(rename_shard(folder, names[kind]), outside / "x.safetensors")
    if kind == "link":
        (folder / "x.safetensors").symlink_to(outside / "x.safetensors")
    if kind == "linked folder":
        (folder / "inner").symlink_to(outside)
    if kind == "loop":
        (folder / "loop.safetensors").symlink_to(folder / "loop.safetensors")
    refused(folder, rf"{INDEX} names the weight file .*, which is not inside .*: get {INDEX} again")
    with pytest.raises(UserError, match="which is not inside"):
        open_weights(folder)


def test_weight_file_shard_in_subfolder_is_read(tmp_path: Path) -> None:
    folder = save_tiny(tmp_path, max_shard_size=SHARDS)
    (folder / "inner").mkdir()
    shutil.move(rename_shard(folder, "inner/x.safetensors"), folder / "inner/x.safetensors")
    assert same_as_transformers(folder)


def test_weight_file_link_within_folder_is_followed(tmp_path: Path) -> None:
    folder = save_tiny(tmp_path, max_shard_size=SHARDS)
    (folder / "x.safetensors").symlink_to(rename_shard(folder, "x.safetensors").name)
    assert same_as_transformers(folder)


def test_weight_file_hub_snapshot_links_into_own_blobs_only(tmp_path: Path) -> None:
    saved = save_tiny(tmp_path / "saved", max_shard_size=SHARDS)
    model = tmp_path / "hub/models--a--b"
    snapshot, blobs = model / "snapshots/0123", model / "blobs"
    snapshot.mkdir(parents=True)
    blobs.mkdir()
    for number, file in enumerate(sorted(saved.iterdir())):
        shutil.move(file, blobs / str(number))
        (snapshot / file.name).symlink_to(os.path.join("..", "..", "blobs", str(number)))
    assert same_as_transformers(snapshot)
    (tmp_path / "short").symlink_to(snapshot)
    assert same_as_transformers(tmp_path / "short")
    other = tmp_path / "hub/models--c--d/blobs"
    other.mkdir(parents=True)
    shard = shards(snapshot)[0]
    shutil.move(shard.resolve(), other / "x")
    shard.unlink()
    shard.symlink_to(other / "x")
    refused(snapshot, rf"names the weight file '{shard.name}', which is not inside")


@pytest.mark.parametrize("kind", ["folder", "dangling link"])
def test_weight_file_folder_or_dangling_link_for_shard_is_refused(tmp_path: Path, kind: str) -> None:
    folder = save_tiny(tmp_path, max_shard_size=SHARDS)
    shard = shards(folder)[1]
    shard.unlink()
    if kind == "folder":
        shard.mkdir()
    else:
        shard.symlink_to("gone.safetensors")
    refused(folder, rf"{shard.name} is (missing|truncated or corrupt)")


def test_weight_file_index_with_deep_json_is_refused(tmp_path: Path) -> None:
    folder = save_tiny(tmp_path, max_shard_size=SHARDS)
    (folder / INDEX).write_text("[" * 100_000)
    refused(folder, rf"{INDEX} is not valid JSON")


def test_export_does_not_inherit_name_of_weight_file(tmp_path: Path) -> None:
    folder, grid = save_tiny(tmp_path / "source", dtype=torch.float16), Grid(4, 32)
    (folder / SINGLE).rename(folder / "other.safetensors")
    edit_json(folder / "config.json", transformers_weights="other.safetensors")
    source = SourceModel.open(folder)
    out = export(source, rounded(source, grid), tmp_path / "out")
    assert "transformers_weights" not in json.loads((out / "config.json").read_text())
    AutoModelForCausalLM.from_pretrained(out)
