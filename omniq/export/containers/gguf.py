# SPDX-License-Identifier: Apache-2.0
"""The container of llama.cpp and the programs that are built on it: one GGUF file with weights, config and tokenizer.

    model.gguf             codes in blocks of ggml, embedding and head in float16, norms and biases in float32
    recipe.yaml, README.md

The metadata are those of ``convert_hf_to_gguf.py``. If the source model is itself a GGUF file, its metadata are copied.
Three keys are omniq's own, and llama.cpp ignores them:

    omniq.format   the format name that users type
    omniq.linears  the grid of each quantized linear in the run, as JSON: [bits, group size, symmetric]
    omniq.config   the config of transformers, as JSON

omniq reads the file back with its own reader. transformers opens it too, with the stored config, except for blocks of
type Q2_0.
"""

import json
from collections import Counter
from collections.abc import Mapping
from dataclasses import replace
from functools import cached_property
from math import prod
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoConfig, PretrainedConfig, PreTrainedModel
from typing_extensions import Self

from omniq.errors import CorruptFile, UserError, one_line
from omniq.export.containers.card import model_card
from omniq.export.containers.container import Results, cast_for_export
from omniq.export.containers.folder_reader import missing_host_memory
from omniq.export.containers.gguf_file import GgufReader, GgufWriter, Value
from omniq.export.containers.gguf_model import (
    ROPE_FACTORS,
    architecture_of,
    config_metadata,
    gguf_name,
    model_name,
    rope_factors,
    row_order,
)
from omniq.export.containers.gguf_tokenizer import tokenizer_metadata
from omniq.export.containers.huggingface import is_described
from omniq.export.containers.requirements import missing_packages
from omniq.export.containers.shards import writing
from omniq.export.containers.target_model import TargetModel, target_model
from omniq.export.formats.codec import WrittenLinear
from omniq.export.formats.ggml import BLOCK_TYPES, Q2_0, Ggml
from omniq.grid.affine import Grid
from omniq.grid.scheme import Scheme
from omniq.models.locate import public_name
from omniq.models.source import SourceModel
from omniq.models.transformers_io import open_checkpoint
from omniq.storage.block_result import QuantizedLinear

FILE = "model.gguf"
_FLOATS = {0: torch.float32, 1: torch.float16}  # types of ggml
_FORMAT, _LINEARS, _CONFIG = "omniq.format", "omniq.linears", "omniq.config"
_COPIED = ("general.", "tokenizer.")  # prefixes of the metadata that are copied, and that of the architecture
_NO_Q2 = "transformers does not read blocks of type Q2_0"


class GgufModel:
    """Implements ``omniq.export.containers.container.Reader``.

    Args:
        path: the folder.
        codec: the codec of the linears.

    Raises:
        CorruptFile: the file is missing or damaged, or is not an export of omniq.
    """

    def __init__(self, path: Path, codec: Ggml) -> None:
        self._codec, self._file = codec, GgufReader(path / FILE)
        self._linears = self._json(_LINEARS)
        self._names = {ours: theirs for theirs in self._file.tensors if (ours := model_name(theirs)) is not None}

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._file.__exit__()

    def __getitem__(self, name: str) -> Tensor:
        info = self._file.tensors[self._names[name]]
        dtype = _FLOATS.get(info.type)
        if dtype is None:
            raise CorruptFile(f"{self._file.file}: {name} is of type {info.type}, not in floating point")
        data = self._file.data(self._names[name], 8 * dtype.itemsize * prod(info.shape))
        return _reordered(name, data.view(dtype).view(info.shape), self.config, back=True).to(torch.float16)

    @property
    def names(self) -> set[str]:
        """Names of all parameters, as the model has them."""
        return set(self._names)

    @property
    def size(self) -> int:
        """Size of all tensors in bytes."""
        return self._file.size

    @property
    def types(self) -> set[int]:
        """Numbers of the types of all tensors."""
        return {info.type for info in self._file.tensors.values()}

    @property
    def format(self) -> str:
        """The format name that users type."""
        return self._file.text(_FORMAT)

    @cached_property
    def config(self) -> PretrainedConfig:
        """The config of transformers."""
        content = dict(self._json(_CONFIG))
        try:
            return AutoConfig.for_model(content.pop("model_type"), **content)
        except Exception as error:  # validation of configs raises many kinds of errors
            raise CorruptFile(f"{self._file.file}: {_CONFIG}: {one_line(error)}") from error

    @cached_property
    def model(self) -> TargetModel:
        """The stock model of the stored config."""
        return TargetModel.of(self.config)

    def names_of(self, name: str) -> set[str]:
        """The parameter that holds a quantized linear."""
        return {f"{name}.weight"}

    def as_stored(self, linear: QuantizedLinear) -> QuantizedLinear:
        """The same weights on the grid of the block that holds them."""
        return self._codec.as_stored(linear)

    def read(self, name: str) -> QuantizedLinear:
        """A quantized linear on the grid of its blocks."""
        info = self._file.tensors[self._names[f"{name}.weight"]]
        type = next((type for type in BLOCK_TYPES.values() if type.number == info.type), None)
        if type is None or name not in self._linears:
            raise CorruptFile(f"{self._file.file}: {name} is of type {info.type}, or {_LINEARS} lacks its grid")
        rows, width = info.shape
        data = self._file.data(self._names[f"{name}.weight"], 8 * rows * (width // type.size) * type.bytes)
        tensors = {f"{name}.{type.name}": data.view(rows, -1)}
        linear = self._codec.load(name, tensors, _grid(self._linears[name]))
        return _reordered_linear(name, linear, self.config, back=True)

    def check_description(self, linears: Mapping[str, WrittenLinear]) -> None:
        """Refuse recorded grids that differ from these, and metadata of llama.cpp that differ from the config."""
        if self._linears != {name: _entry(linear.grid) for name, linear in linears.items()}:
            raise CorruptFile(f"{self._file.file}: {_LINEARS} does not describe the weights")
        for key, value in config_metadata(self.config, "").items():
            found = self._file.metadata.get(key, value)
            if key != "general.name" and not _same(found.decoded(), value.decoded()):
                raise CorruptFile(
                    f"{self._file.file}: {key} is {found.decoded()!r}, and {value.decoded()!r} in the config"
                )

    def _json(self, key: str) -> dict[str, Any]:
        try:
            content = json.loads(self._file.text(key))
        except ValueError as error:
            raise CorruptFile(f"{self._file.file}: {key}: {error}") from error
        if not isinstance(content, dict):
            raise CorruptFile(f"{self._file.file}: {key} is not a table")
        return content


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
            _FORMAT: Value.text(format),
            _LINEARS: Value.text(json.dumps({name: _entry(found.grid) for name, found in parameters.linears.items()})),
            _CONFIG: Value.text(json.dumps(json.loads(model.config.to_json_string()), sort_keys=True)),
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
            return file.text(_FORMAT)

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
        return open_checkpoint(path, FILE, config=config, dtype=torch.float16)


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
        [(key, data)] = codec.store(name, _reordered_linear(name, linear, self._config)).items()
        type = BLOCK_TYPES[key.rpartition(".")[2]]
        self.types[type.file_type] += linear.codes.numel()
        self._add(f"{name}.weight", tuple(linear.codes.shape), type.number, data)

    def add(self, name: str, tensor: Tensor) -> None:
        """Add any other parameter by its full name: matrices in float16, vectors in float32, as llama.cpp needs it."""
        cast = cast_for_export(name, tensor, self._scheme)
        cast = _reordered(name, cast if cast.dim() > 1 else cast.float(), self._config)
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


def _reordered(name: str, tensor: Tensor, config: PretrainedConfig, back: bool = False) -> Tensor:
    """A parameter with its rows in the order of llama.cpp, or ``back`` in that of the model."""
    order = row_order(name, config, len(tensor))
    if order is None:
        return tensor
    return tensor[order.argsort() if back else order]


def _reordered_linear(
    name: str, linear: QuantizedLinear, config: PretrainedConfig, back: bool = False
) -> QuantizedLinear:
    codes, scale, zero_point = (
        _reordered(f"{name}.weight", part, config, back) for part in (linear.codes, linear.scale, linear.zero_point)
    )
    return replace(linear, codes=codes, scale=scale, zero_point=zero_point)


def _entry(grid: Grid) -> list[Any]:
    return [grid.bits, grid.group_size, grid.symmetric]


def _grid(entry: list[Any]) -> Grid:
    bits, group_size, symmetric = entry
    return Grid(bits, group_size, symmetric)


def _same(found: Any, expected: Any) -> bool:
    """True for equal values; a real number of the file has the precision of float32."""
    if isinstance(expected, float):
        return bool(torch.tensor(found) == torch.tensor(expected))
    return bool(found == expected)
