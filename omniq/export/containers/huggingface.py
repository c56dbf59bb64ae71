# SPDX-License-Identifier: Apache-2.0
"""The container that all common runtimes open: a Hugging Face folder.

    config.json               config of the stock model, with ``quantization_config`` as the codec describes it
    *.safetensors             all parameters, in shards
    generation_config.json, tokenizer files, recipe.yaml, README.md

Weights are written first, with one block in memory at a time, then all other files. The same inputs give the same
bytes.

``quantization_config.quant_method`` is the runtime's name of the layout. The format name that users type is recorded
beside it as ``omniq_format``, because several formats may share one method. Folders of older versions lack this key;
there, the two names are equal.

File names do not identify a folder of omniq, because other tools use the same names (llm-compressor writes a
``config.json`` and a ``recipe.yaml``). The content of its card or of its recipe does; one of the two may be damaged.
"""

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import yaml
from transformers import GenerationConfig, PreTrainedModel

from omniq.errors import UserError
from omniq.export.containers.card import is_card, model_card
from omniq.export.containers.container import Results, cast_for_export
from omniq.export.containers.folder_reader import FolderCodec, FolderReader, missing_memory, read_config
from omniq.export.containers.requirements import missing_packages
from omniq.export.containers.shards import ShardWriter, writing
from omniq.export.containers.target_model import TargetModel, target_model
from omniq.export.formats.codec import Shape, WrittenLinear
from omniq.grid.affine import Grid
from omniq.grid.scheme import Scheme
from omniq.models.source import SourceModel
from omniq.models.transformers_io import open_checkpoint

_FORMAT = "omniq_format"
_SECTIONS = {"model", "data", "stages", "scheme"}  # every recipe of omniq has these sections


class HuggingFaceFolder:
    """Implements ``omniq.export.containers.container.Container``."""

    def check_source(self, source: SourceModel) -> None:
        """Accept any model: the folder holds what transformers holds."""

    def write(
        self,
        source: SourceModel,
        results: Results,
        codec: FolderCodec,
        folder: Path,
        *,
        format: str,
        scheme: Scheme,
        max_shard_bytes: int,
    ) -> dict[str, Any]:
        """Write all tensors and ``config.json``; return facts about them for the card."""
        writer = ShardWriter(folder, max_shard_bytes)
        linears, plain, summaries = _write_blocks(source, results, codec, scheme, writer)
        for name, tensor in source.outside():
            plain.add(name)
            writer.add(name, cast_for_export(name, tensor, scheme, source.keeps_float32(name)))
        model = target_model(source.config, plain | {f"{name}.weight" for name in linears})
        for name, shape in model.biases_without_value(plain | {f"{name}.weight" for name in linears}).items():
            writer.add(name, torch.zeros(shape, dtype=scheme.export_dtype))
        size = writer.close()
        unquantized = [name for name in model.linears if name not in linears]
        entries = {"quantization_config": codec.quantization_config(linears, unquantized), _FORMAT: format}
        _write_config(model, entries, scheme, folder)
        weights = sum(linear.weights for linear in linears.values())
        mean_bits = sum(linear.bits_per_weight * linear.weights for linear in linears.values()) / weights
        return {"scheme": str(scheme), "bits_per_weight": mean_bits, "bytes": size, "blocks": summaries}

    def write_companions(self, source: SourceModel, facts: Mapping[str, Any], folder: Path) -> None:
        """Write generation config, tokenizer, recipe and model card."""
        given, tokenizer = source.folder / "generation_config.json", source.tokenizer()
        with writing(folder):
            if given.is_file():  # copied, because transformers refuses to save some configs that it loads
                shutil.copyfile(given, folder / given.name)
            else:
                GenerationConfig.from_model_config(source.config).save_pretrained(folder)
            tokenizer.save_pretrained(folder)
            (folder / "recipe.yaml").write_text(str(facts.get("recipe", "")), encoding="utf-8")
            (folder / "README.md").write_text(model_card(facts), encoding="utf-8")

    def read(self, path: Path, codec: FolderCodec) -> FolderReader:
        """Open the folder without transformers' quantizers."""
        return FolderReader(path, codec)

    def is_ours(self, path: Path) -> bool:
        """True if the folder contains a config, and a card or a recipe of omniq."""
        return is_described(path) and (path / "config.json").is_file()

    def format_of(self, path: Path) -> str:
        """The recorded format name; in folders of versions that did not record it, the name of the method."""
        config = read_config(path)
        return str(config.get(_FORMAT, config["quantization_config"].get("quant_method")))

    def lacks(self, codec: FolderCodec, path: Path | None = None) -> str | None:
        """The packages or the memory that transformers lacks for this codec."""
        packages = missing_packages(codec.requires)
        return packages if packages or path is None else missing_memory(path, codec.stays_packed)

    def open(self, path: Path) -> PreTrainedModel:
        """Open the model with ``AutoModelForCausalLM.from_pretrained``."""
        return open_checkpoint(path)


def _write_blocks(
    source: SourceModel, results: Results, codec: FolderCodec, scheme: Scheme, writer: ShardWriter
) -> tuple[dict[str, WrittenLinear], set[str], list[dict[str, Any]]]:
    """Write all blocks; return their quantized linears and other parameters by full name, and their summaries.

    Raises:
        UserError: the codec cannot hold a linear or this combination of grids, or no linear is quantized.
    """
    linears: dict[str, WrittenLinear] = {}
    plain: set[str] = set()
    summaries = []
    for index in range(source.num_blocks):
        block, result = source.block_name(index), results(index)
        for name, linear in result.linears.items():
            full = f"{block}.{name}"
            codec.check_linear(full, linear)
            linears[full] = WrittenLinear.of(linear)
            for key, tensor in codec.store(full, linear).items():
                writer.add(key, tensor)
        for name, tensor in result.tensors.items():
            plain.add(f"{block}.{name}")
            keep = source.keeps_float32(f"{block}.{name}")
            writer.add(f"{block}.{name}", cast_for_export(f"{block}.{name}", tensor, scheme, keep))
        summaries.append(dict(result.summary))
    if not linears:
        raise UserError("no linear of any block is quantized: quantize at least one block before exporting")
    shapes: dict[Grid, set[Shape]] = {}
    for written in linears.values():
        shapes.setdefault(written.grid, set()).add(written.shape)
    codec.check(grids=shapes)
    return linears, plain, summaries


def _write_config(model: TargetModel, entries: Mapping[str, Any], scheme: Scheme, folder: Path) -> None:
    """Write ``config.json`` with additional entries."""
    config = model.config
    config.dtype = scheme.export_dtype
    config.architectures = [model.architecture]
    file = folder / "config.json"
    with writing(file):
        config.to_json_file(file)
        content = json.loads(file.read_text(encoding="utf-8"))
        content.pop("auto_map", None)  # refers to custom code of the source model; the export is the stock model
        content |= {**entries, **_older_names(content)}
        file.write_text(json.dumps(content, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def _older_names(content: Mapping[str, Any]) -> dict[str, Any]:
    """``rope_parameters`` under their names in transformers 4.

    transformers 4, and a vLLM that uses it, do not know the new name. Without the old names, both would silently use
    the base 10000. transformers 5 reads the same values from both names.
    """
    rope = content.get("rope_parameters") or {}
    if "rope_theta" not in rope:
        return {}
    scaling = {key: value for key, value in rope.items() if key != "rope_theta"}
    scaled = scaling.get("rope_type", "default") != "default"
    return {"rope_theta": rope["rope_theta"]} | ({"rope_scaling": scaling} if scaled else {})


def is_described(path: Path) -> bool:
    """True if a folder contains a card or a recipe of omniq."""
    return is_card(_text(path / "README.md")) or _is_recipe(_text(path / "recipe.yaml"))


def _is_recipe(text: str) -> bool:
    """True if a text is YAML with the sections of an omniq recipe."""
    try:
        recipe = yaml.safe_load(text)
    except (yaml.YAMLError, ValueError):  # ValueError: an impossible date
        return False
    return isinstance(recipe, dict) and recipe.keys() >= _SECTIONS


def _text(file: Path) -> str:
    """The readable part of a file that may be missing or damaged."""
    return file.read_text(encoding="utf-8", errors="replace") if file.is_file() else ""
