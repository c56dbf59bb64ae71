# SPDX-License-Identifier: Apache-2.0
"""Reads a Hugging Face folder without transformers' quantizers: config, grids, tensors, and the memory that it needs.

Memory that transformers needs, measured with a model of 257 MiB in float16: in the formats of compressed-tensors, every
weight in the export dtype plus the stored tensors (4 bits, 68 MiB stored: 344 MiB; 8 bits, 129 MiB stored: 393 MiB). In
omniq's format, the stored tensors plus 20 bytes for each weight of the linear that runs.
"""

import json
from collections.abc import Mapping, Sequence
from functools import cached_property
from math import prod
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor
from transformers import AutoConfig
from typing_extensions import Self

from omniq.distributed.memory import free_host_memory
from omniq.errors import CorruptFile, UserError, one_line
from omniq.export.containers.shards import ShardReader
from omniq.export.containers.target_model import TargetModel
from omniq.export.formats.codec import Codec, WrittenLinear
from omniq.grid.affine import Grid
from omniq.grid.dtypes import MODEL_DTYPES, torch_dtype
from omniq.storage.block_result import QuantizedLinear

_UNPACKING = 20  # bytes per weight
_SPARE = 1.1  # factor for activations, logits, and the use of other programs


class FolderCodec(Codec, Protocol):
    """A codec whose grids ``config.json`` describes.

    Attributes:
        stays_packed: True if transformers keeps the weights in stored form.
    """

    @property
    def stays_packed(self) -> bool: ...

    def quantization_config(self, linears: Mapping[str, WrittenLinear], ignore: Sequence[str]) -> dict[str, Any]:
        """The entry of ``config.json`` that tells a runtime how to read the tensors.

        Args:
            linears: the quantized linears by full name.
            ignore: full names of all other linears.
        """

    def grid_of(self, name: str, config: Mapping[str, Any], dtype: torch.dtype) -> Grid:
        """Invert ``quantization_config`` for one linear.

        Args:
            name: full name of the linear.
            config: the entry of ``config.json``.
            dtype: dtype of the model.

        Raises:
            KeyError, TypeError, AttributeError, UserError: omniq does not write such a config.
        """


class FolderReader:
    """Implements ``omniq.export.containers.container.Reader``.

    Args:
        path: the folder.
        codec: the codec with which it was written.

    Raises:
        CorruptFile: config or weights are missing or damaged.
    """

    def __init__(self, path: Path, codec: FolderCodec) -> None:
        self._path, self._codec = path, codec
        self._content = read_config(path)
        self._shards = ShardReader(path)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._shards.__exit__()

    def __getitem__(self, name: str) -> Tensor:
        return self._shards[name]

    @property
    def names(self) -> set[str]:
        """Names of all stored tensors."""
        return self._shards.names

    @cached_property
    def linears(self) -> set[str]:
        """Full names of the quantized linears: those with other tensors than weight and bias."""
        return {name for name in self.model.linears if self.names_of(name) - {f"{name}.weight"}}

    @property
    def size(self) -> int:
        """Size of all tensors in bytes."""
        return self._shards.size

    @cached_property
    def model(self) -> TargetModel:
        """The stock model that ``config.json`` describes."""
        return stock_model(self._path)

    def names_of(self, name: str) -> set[str]:
        """Names of the stored tensors of a quantized linear, without its bias, which is a plain parameter."""
        return {key for key in self._shards.names if key.startswith(f"{name}.")} - {f"{name}.bias"}

    def as_stored(self, linear: QuantizedLinear) -> QuantizedLinear:
        """The same linear: the files hold its codes, scales and zero points."""
        return linear

    def read(self, name: str) -> QuantizedLinear:
        """A quantized linear on the grid that ``config.json`` records."""
        dtype = self._content["dtype"]
        try:
            grid = self._codec.grid_of(name, self._content["quantization_config"], torch_dtype(dtype))
        except (KeyError, TypeError, AttributeError, UserError) as error:
            raise CorruptFile(f"{self._path / 'config.json'} does not describe the grid of {name}: {error}") from error
        return self._codec.load(name, {key: self._shards[key] for key in self.names_of(name)}, grid)

    def check_description(self, linears: Mapping[str, WrittenLinear]) -> None:
        """Refuse a ``quantization_config`` that does not describe these linears."""
        ignore = [name for name in self.model.linears if name not in linears]
        if self._content["quantization_config"] != self._codec.quantization_config(linears, ignore):
            raise CorruptFile(f"{self._path / 'config.json'}: its quantization_config does not describe the weights")


def read_config(path: Path) -> dict[str, Any]:
    """Read ``config.json`` of a quantized model.

    Raises:
        CorruptFile: the file is missing or damaged, or does not describe a quantized model.
    """
    file = path / "config.json"
    try:
        content = json.loads(file.read_bytes())
    except (OSError, ValueError) as error:
        raise CorruptFile(f"{file}: {error}") from error
    if not isinstance(content, dict) or not isinstance(content.get("quantization_config"), dict):
        raise CorruptFile(f"{file} has no quantization_config")
    if content.get("dtype") not in MODEL_DTYPES:
        raise CorruptFile(f"{file} has dtype {content.get('dtype')!r}, which is not one of {', '.join(MODEL_DTYPES)}")
    return content


def stock_model(path: Path) -> TargetModel:
    """The model that ``config.json`` describes, without its quantization.

    Raises:
        CorruptFile: transformers cannot build it.
    """
    try:
        config = AutoConfig.from_pretrained(path)
        del config.quantization_config
        return TargetModel.of(config)
    except Exception as error:  # validation of configs raises many kinds of errors
        raise CorruptFile(f"{path / 'config.json'}: {one_line(error)}") from error


def missing_memory(path: Path, stays_packed: bool) -> str | None:
    """A message if transformers lacks host memory to open a folder; None if the memory suffices."""
    return missing_host_memory(needed_memory(path, stays_packed))


def missing_host_memory(opened: int) -> str | None:
    """A message if transformers lacks host memory for a model of this size in bytes; None if the memory suffices."""
    needed, free = int(_SPARE * opened), free_host_memory()
    if needed <= free:
        return None
    return f"transformers needs {needed / 1e9:,.1f} GB of host memory to open it, and {free / 1e9:,.1f} GB are free"


def needed_memory(path: Path, stays_packed: bool) -> int:
    """Host memory of the opened model in bytes.

    Args:
        path: the folder.
        stays_packed: True if transformers keeps the weights in stored form.
    """
    model = stock_model(path)
    dtype = model.config.dtype
    stored = sum(file.stat().st_size for file in path.glob("*.safetensors"))
    if stays_packed:
        linears = model.parameters.keys() & {f"{name}.weight" for name in model.linears}  # excludes a tied head
        return stored + _UNPACKING * max(prod(model.parameters[name]) for name in linears)
    width = dtype.itemsize if isinstance(dtype, torch.dtype) else 4
    return stored + width * sum(map(prod, model.parameters.values()))
