# SPDX-License-Identifier: Apache-2.0
"""Reads a GGUF file of omniq without llama.cpp: config, grids and parameters, in the order of the model's rows.

Three keys of the metadata are omniq's own:

    omniq.format   the format name that users type
    omniq.linears  the grid of each quantized linear in the run, as JSON: [bits, group size, symmetric]
    omniq.config   the config of transformers, as JSON
"""

import json
from collections.abc import Mapping
from functools import cached_property
from math import prod
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoConfig, PretrainedConfig
from typing_extensions import Self

from omniq.errors import CorruptFile, one_line
from omniq.export.containers.gguf_file import GgufReader, TensorInfo
from omniq.export.containers.gguf_model import config_metadata, model_name, reordered, reordered_linear
from omniq.export.containers.target_model import TargetModel
from omniq.export.formats.codec import WrittenLinear
from omniq.export.formats.ggml import BLOCK_TYPES, Ggml
from omniq.grid.affine import Grid
from omniq.storage.block_result import QuantizedLinear

FILE = "model.gguf"
FORMAT, LINEARS, CONFIG = "omniq.format", "omniq.linears", "omniq.config"
_BLOCKS = {type.number: type for type in BLOCK_TYPES.values()}
_FLOATS = {0: torch.float32, 1: torch.float16}  # types of ggml


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
        self._linears = self._json(LINEARS)
        self._names = {ours: theirs for theirs in self._file.tensors if (ours := model_name(theirs)) is not None}
        for name, info in self._file.tensors.items():
            self._file.place(name, self._bits(name, info))

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._file.__exit__()

    def __getitem__(self, name: str) -> Tensor:
        info = self._file.tensors[self._names[name]]
        dtype = _FLOATS.get(info.type)
        if dtype is None:
            raise CorruptFile(f"{self._file.file}: {name} is of type {info.type}, not in floating point")
        data = self._file.data(self._names[name], self._bits(name, info))
        return reordered(name, data.view(dtype).view(info.shape), self.config, back=True).to(torch.float16)

    @property
    def names(self) -> set[str]:
        """Names of all parameters, as the model has them."""
        return set(self._names)

    @property
    def linears(self) -> set[str]:
        """Full names of the quantized linears."""
        return set(self._linears)

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
        return self._file.text(FORMAT)

    @cached_property
    def config(self) -> PretrainedConfig:
        """The config of transformers."""
        content = dict(self._json(CONFIG))
        try:
            return AutoConfig.for_model(content.pop("model_type"), **content)
        except Exception as error:  # validation of configs raises many kinds of errors
            raise CorruptFile(f"{self._file.file}: {CONFIG}: {one_line(error)}") from error

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
        type = _BLOCKS.get(info.type)
        if type is None or name not in self._linears:
            raise CorruptFile(f"{self._file.file}: {name} is of type {info.type}, or {LINEARS} lacks its grid")
        data = self._file.data(self._names[f"{name}.weight"], self._bits(name, info))
        tensors = {f"{name}.{type.name}": data.view(info.shape[0], -1)}
        linear = self._codec.load(name, tensors, _grid(self._linears[name]))
        return reordered_linear(name, linear, self.config, back=True)

    def check_description(self, linears: Mapping[str, WrittenLinear]) -> None:
        """Refuse recorded grids that differ from these, and metadata of llama.cpp that differ from the config."""
        if self._linears != {name: entry_of(linear.grid) for name, linear in linears.items()}:
            raise CorruptFile(f"{self._file.file}: {LINEARS} does not describe the weights")
        for key, value in config_metadata(self.config, "").items():
            found = self._file.metadata.get(key, value)
            if key != "general.name" and not _same(found.decoded(), value.decoded()):
                raise CorruptFile(
                    f"{self._file.file}: {key} is {found.decoded()!r}, and {value.decoded()!r} in the config"
                )

    def _bits(self, name: str, info: TensorInfo) -> int:
        """Bits of all elements of a tensor."""
        block = _BLOCKS.get(info.type)
        if block is not None and info.shape and info.shape[-1] % block.size == 0:
            return 8 * block.bytes * prod(info.shape) // block.size
        if info.type not in _FLOATS:
            raise CorruptFile(f"{self._file.file}: {name} has type {info.type}, which omniq does not write")
        return 8 * _FLOATS[info.type].itemsize * prod(info.shape)

    def _json(self, key: str) -> dict[str, Any]:
        try:
            content = json.loads(self._file.text(key))
        except ValueError as error:
            raise CorruptFile(f"{self._file.file}: {key}: {error}") from error
        if not isinstance(content, dict):
            raise CorruptFile(f"{self._file.file}: {key} is not a table")
        return content


def entry_of(grid: Grid) -> list[Any]:
    return [grid.bits, grid.group_size, grid.symmetric]


def _grid(entry: list[Any]) -> Grid:
    bits, group_size, symmetric = entry
    return Grid(bits, group_size, symmetric)


def _same(found: Any, expected: Any) -> bool:
    """True for equal values; a real number of the file has the precision of float32."""
    if isinstance(expected, float):
        return bool(torch.tensor(found) == torch.tensor(expected))
    return bool(found == expected)
