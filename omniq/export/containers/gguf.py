# SPDX-License-Identifier: Apache-2.0
"""The container of llama.cpp and the programs that are built on it: one GGUF file with weights, config and tokenizer.

    model.gguf             codes in blocks of ggml, embedding and head in float16, norms and biases in float32
    recipe.yaml, README.md

The metadata are those of ``convert_hf_to_gguf.py``. If the source model is itself a GGUF file, its metadata are copied.
llama.cpp ignores the keys that omniq adds (``gguf_reader.py``).

omniq reads the file back with its own reader. transformers opens it too, with the stored config, except for blocks of
type Q2_0.
"""

import json
from collections import Counter
from collections.abc import Mapping
from math import prod
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoConfig, PreTrainedModel
from transformers.utils import quantization_config

from omniq.errors import UserError
from omniq.export.containers.card import model_card
from omniq.export.containers.container import Results, cast_for_export
from omniq.export.containers.folder_reader import missing_host_memory
from omniq.export.containers.gguf_file import GgufReader, GgufWriter, Value
from omniq.export.containers.gguf_model import (
    ROPE_FACTORS,
    architecture_of,
    config_metadata,
    gguf_name,
    reordered,
    reordered_linear,
    rope_factors,
)
from omniq.export.containers.gguf_reader import CONFIG, FILE, FORMAT, LINEARS, GgufModel, entry_of
from omniq.export.containers.gguf_tokenizer import tokenizer_metadata
from omniq.export.containers.huggingface import is_described
from omniq.export.containers.requirements import missing_packages
from omniq.export.containers.shards import writing
from omniq.export.containers.target_model import target_model
from omniq.export.formats.codec import WrittenLinear
from omniq.export.formats.ggml import BLOCK_TYPES, Q2_0, Ggml
from omniq.grid.scheme import Scheme
from omniq.models.locate import public_name
from omniq.models.source import SourceModel
from omniq.models.transformers_io import open_checkpoint
from omniq.storage.block_result import QuantizedLinear

_COPIED = ("general.", "tokenizer.")  # prefixes of the metadata that are copied, and that of the architecture
GgufConfig = getattr(quantization_config, "GgufConfig", None)  # older releases always unpack the blocks
_NO_Q2 = "transformers does not read blocks of type Q2_0"


class GgufFile:
    """Implements ``omniq.export.containers.container.Container``."""

    def check_source(self, source: SourceModel) -> None:
        """Refuse a model or a tokenizer that llama.cpp does not know.

        Raises:
            UserError: names the model type, the part of its config, or the tokenizer.
        """
        _described(source)

    def write(
        self,
        source: SourceModel,
        results: Results,
        codec: Ggml,
        folder: Path,
        *,
        format: str,
        scheme: Scheme,
        max_shard_bytes: int,
    ) -> dict[str, Any]:
        """Write ``model.gguf``; return facts about its tensors for the card. The size of the file has no limit."""
        metadata, parameters = _described(source), _Parameters(source, scheme, folder)
        summaries = []
        for index in range(source.num_blocks):
            block, result = source.block_name(index), results(index)
            for name, linear in result.linears.items():
                parameters.add_linear(f"{block}.{name}", linear, codec)
            for name, tensor in result.tensors.items():
                parameters.add(f"{block}.{name}", tensor)
            summaries.append(dict(result.summary))
        if not parameters.linears:
            raise UserError("no linear of any block is quantized: quantize at least one block before exporting")
        for name, tensor in source.outside():
            parameters.add(name, tensor)
        model = target_model(source.config, parameters.names)
        for name, shape in model.biases_without_value(parameters.names).items():
            parameters.add(name, torch.zeros(shape, dtype=scheme.export_dtype))
        model.config.dtype, model.config.architectures = scheme.export_dtype, [model.architecture]
        metadata |= {
            "general.file_type": Value.integer(parameters.types.most_common(1)[0][0]),  # OpenVINO requires it
            "general.quantization_version": Value.integer(2),
            FORMAT: Value.text(format),
            LINEARS: Value.text(json.dumps({name: entry_of(found.grid) for name, found in parameters.linears.items()})),
            CONFIG: Value.text(json.dumps(json.loads(model.config.to_json_string()), sort_keys=True)),
        }
        size = parameters.writer.close(metadata)
        weights = sum(linear.weights for linear in parameters.linears.values())
        bits = sum(linear.bits_per_weight * linear.weights for linear in parameters.linears.values()) / weights
        return {"scheme": str(scheme), "bits_per_weight": bits, "bytes": size, "blocks": summaries}

    def write_companions(self, source: SourceModel, facts: Mapping[str, Any], folder: Path) -> None:
        """Write recipe and model card."""
        file = f"{facts.get('name', 'path/to/this/folder')}/{FILE}"
        usage = f'```\nllama-cli -m {file} -p "The capital of France is"\nllama-server -m {file}\n```'
        with writing(folder):
            (folder / "recipe.yaml").write_text(str(facts.get("recipe", "")), encoding="utf-8")
            card = model_card({**facts, "usage": usage, "library": "gguf"})
            (folder / "README.md").write_text(card, encoding="utf-8")

    def read(self, path: Path, codec: Ggml) -> GgufModel:
        """Open the file without its runtime."""
        return GgufModel(path, codec)

    def is_ours(self, path: Path) -> bool:
        """True if the folder contains a GGUF file, and a card or a recipe of omniq."""
        return is_described(path) and (path / FILE).is_file()

    def format_of(self, path: Path) -> str:
        """The recorded format name."""
        with GgufReader(path / FILE) as file:
            return file.text(FORMAT)

    def lacks(self, codec: Ggml, path: Path | None = None) -> str | None:
        """The reason why transformers cannot open the file here: packages, memory, or blocks of type Q2_0."""
        if (packages := missing_packages(("gguf", "accelerate"))) or path is None:
            return packages or (_NO_Q2 if codec.uses(Q2_0) else None)
        with GgufModel(path, codec) as file:
            if Q2_0.number in file.types:
                return _NO_Q2
            return missing_host_memory(file.size + 4 * sum(map(prod, file.model.parameters.values())))

    def open(self, path: Path) -> PreTrainedModel:
        """Open the file in transformers, with the stored config."""
        with GgufModel(path, Ggml(Scheme("W8A16"))) as file:
            config = file.config
        if config.model_type == "mistral":  # transformers has no table of names for it: the file says llama
            content = {key: value for key, value in config.to_dict().items() if key != "model_type"}
            config = AutoConfig.for_model("llama", **content)
        # transformers 5.23 keeps the blocks packed by default, and computes in float32 then
        unpacked = {"quantization_config": GgufConfig(dequantize=True)} if GgufConfig is not None else {}
        return open_checkpoint(path, FILE, config=config, dtype=torch.float16, **unpacked)


class _Parameters:
    """Adds parameters to a GGUF file under the names, in the order of rows, and in the types of llama.cpp.

    Args:
        source: the source model.
        scheme: the number formats of the model.
        folder: the folder of the file.
    """

    def __init__(self, source: SourceModel, scheme: Scheme, folder: Path) -> None:
        self._config, self._scheme = source.config, scheme
        self._architecture = architecture_of(source.config)
        self.writer, self.linears, self.names = GgufWriter(folder / FILE), dict[str, WrittenLinear](), set[str]()
        self.types: Counter[int] = Counter()
        if (factors := rope_factors(source.config)) is not None:
            self.writer.add(ROPE_FACTORS, tuple(factors.shape), 0, factors)

    def add_linear(self, name: str, linear: QuantizedLinear, codec: Ggml) -> None:
        """Add a quantized linear by its full name."""
        codec.check_linear(name, linear)
        self.linears[name] = WrittenLinear.of(linear)
        [(key, data)] = codec.store(name, reordered_linear(name, linear, self._config)).items()
        type = BLOCK_TYPES[key.rpartition(".")[2]]
        self.types[type.file_type] += linear.codes.numel()
        self._add(f"{name}.weight", tuple(linear.codes.shape), type.number, data)

    def add(self, name: str, tensor: Tensor) -> None:
        """Add any other parameter by its full name: matrices in float16, vectors in float32, as llama.cpp needs it."""
        cast = cast_for_export(name, tensor, self._scheme)
        cast = reordered(name, cast if cast.dim() > 1 else cast.float(), self._config)
        self._add(name, tuple(cast.shape), 1 if cast.dim() > 1 else 0, cast)

    def _add(self, name: str, shape: tuple[int, ...], type: int, data: Tensor) -> None:
        self.names.add(name)
        self.writer.add(gguf_name(name, self._architecture), shape, type, data)


def _described(source: SourceModel) -> dict[str, Value]:
    """The metadata of the model, without the keys that depend on the export."""
    architecture = architecture_of(source.config)
    if source.gguf_file is None:
        metadata = config_metadata(source.config, public_name(source.path).rpartition("/")[2])
        return metadata | tokenizer_metadata(source.tokenizer(), source.config.vocab_size)
    with GgufReader(source.gguf_file) as given:
        return {key: value for key, value in given.metadata.items() if key.startswith((*_COPIED, f"{architecture}."))}
