# SPDX-License-Identifier: Apache-2.0
"""Weights by name, without holding the model.

A ``Checkpoint`` says what tensors it stores (names, shapes, files) once it is opened, and reads those it is asked for.

- safetensors, one file or an index of several: only headers are read on opening; a tensor is mapped from its file when
  asked for, so host memory holds the block in hand, however large the model.
- GGUF: transformers dequantizes and renames all tensors at once, and they stay in host memory. GGUF models are small:
  large ones exist as safetensors.

Everything that can be wrong with the files is said on opening, before any work: a header that does not parse, a
truncated file (safetensors compares its length with the header), a shard the index names and the folder lacks.
"""

import hashlib
import json
from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor
from transformers import AutoModelForCausalLM, PretrainedConfig

from omniq.errors import UserError
from omniq.models.gguf import reading_gguf
from omniq.models.locate import PICKLE, pickle_refusal

INDEX = "model.safetensors.index.json"
_CHUNK = 1 << 22  # bytes hashed at once


@dataclass(frozen=True)
class Stored:
    """A tensor as it lies in its file: shape, dtype in the file's own words, and the file."""

    shape: tuple[int, ...]
    dtype: str
    file: Path


class Checkpoint(ABC):
    """An opened checkpoint.

    Args:
        tensors: every tensor it stores, by name.
        files: the weight files.
        description: what digests the model's structure: config.json, or nothing where the weight file holds it.
    """

    def __init__(self, tensors: Mapping[str, Stored], files: Iterable[Path], description: bytes = b"") -> None:
        self.tensors = tensors
        self.files = tuple(sorted(files))
        self._description = description

    @abstractmethod
    def read(self, names: Iterable[str]) -> dict[str, Tensor]:
        """These tensors, on the CPU, in their stored dtype. They may be views of a mapped file: copy what is kept."""

    def digest(self) -> str:
        """SHA-256 over the config, every tensor's name, shape and dtype, and the content of every weight file."""
        digest = hashlib.sha256(self._description)
        described = [(name, stored.shape, stored.dtype) for name, stored in sorted(self.tensors.items())]
        digest.update(json.dumps(described).encode())
        for file in self.files:
            digest.update(_sha256(file))
        return digest.hexdigest()


class SafetensorsCheckpoint(Checkpoint):
    """One safetensors file, or several: every file is opened for a read and closed after it.

    Raises:
        UserError: a file is missing, truncated or no safetensors file, or lacks a tensor that the index promises.
    """

    def __init__(self, folder: Path, name: str | None = None) -> None:
        promised = {} if name is not None else _index(folder)
        files = {folder / file for file in promised.values()} or {folder / (name or "model.safetensors")}
        tensors = {key: stored for file in sorted(files) for key, stored in _header(file).items()}
        for key, file in promised.items():
            if key not in tensors or tensors[key].file != folder / file:
                raise UserError(f"{folder / file} lacks the tensor {key} that {INDEX} promises: get both files again")
        super().__init__(tensors, files, (folder / "config.json").read_bytes())

    def read(self, names: Iterable[str]) -> dict[str, Tensor]:
        by_file: dict[Path, list[str]] = {}
        for name in names:
            by_file.setdefault(self.tensors[name].file, []).append(name)
        found = {}
        for file, wanted in by_file.items():
            with safe_open(file, "pt") as opened:
                found.update({name: opened.get_tensor(name) for name in wanted})
        return found


class GgufCheckpoint(Checkpoint):
    """A GGUF file, dequantized into host memory by transformers.

    Args:
        folder, name: the file.
        config: of the model, read from it before (reading the vocabulary in a GGUF header takes seconds).
        dtype: dtype of the tensors held; dequantized in float32 and rounded once.

    Raises:
        UserError: the file does not parse, or its architecture is unknown to transformers.
    """

    def __init__(self, folder: Path, name: str, config: PretrainedConfig, dtype: torch.dtype = torch.float32) -> None:
        file = folder / name
        with reading_gguf(file):
            model = AutoModelForCausalLM.from_pretrained(folder, gguf_file=name, config=config, dtype=dtype)
        # named_parameters names a tied tensor once; what is derived (rotary tables) is not in the state dict.
        names = {key for key, _ in model.named_parameters()} | {key for key, _ in model.named_buffers()}
        self._held = {key: value.detach() for key, value in model.state_dict().items() if key in names}
        label = str(dtype).removeprefix("torch.")
        super().__init__({key: Stored(tuple(value.shape), label, file) for key, value in self._held.items()}, [file])

    def read(self, names: Iterable[str]) -> dict[str, Tensor]:
        return {name: self._held[name] for name in names}


def weights_in(folder: Path) -> str | None:
    """The weight file of a folder in which none was named: None for ``model.safetensors`` or its index.

    Raises:
        UserError: there are no weights, only pickle files, or several files to choose from.
    """
    if (folder / INDEX).exists() or (folder / "model.safetensors").exists():
        return None
    files = sorted(file for file in folder.iterdir() if file.is_file())
    tensors = [file.name for file in files if file.suffix == ".safetensors"]
    ggufs = [file.name for file in files if file.suffix == ".gguf"]
    if len(tensors) > 1:
        raise UserError(f"{folder} holds several safetensors files and no {INDEX}: add the index, or name one file")
    if not tensors and len(ggufs) > 1:
        raise UserError(f"{folder} holds several GGUF files: set model.gguf_file to one of {', '.join(ggufs)}")
    if tensors or ggufs:
        return (tensors or ggufs)[0]
    for file in files:
        if file.suffix in PICKLE:
            raise UserError(pickle_refusal(file))
    raise UserError(f"{folder} holds no weights: model.safetensors, {INDEX} with its shards, or a GGUF file is needed")


def read_json(file: Path) -> dict[str, Any]:
    """A JSON file that must be there and must hold an object.

    Raises:
        UserError: names the file.
    """
    try:
        content = json.loads(file.read_bytes())
    except OSError as error:
        raise UserError(f"{file} cannot be read ({error.strerror}): a model folder needs it") from error
    except ValueError as error:
        raise UserError(f"{file} is no valid JSON ({error}): get the file again") from error
    if not isinstance(content, dict):
        raise UserError(f"{file} holds no JSON object: get the file again")
    return content


def _index(folder: Path) -> dict[str, str]:
    if not (folder / INDEX).exists():
        return {}
    names = read_json(folder / INDEX).get("weight_map")
    if not isinstance(names, dict) or not names or not all(isinstance(name, str) for name in names.values()):
        raise UserError(f"{folder / INDEX} has no weight_map of file names: get the file again")
    return names


def _header(file: Path) -> dict[str, Stored]:
    try:
        with safe_open(file, "pt") as opened:
            slices = {name: opened.get_slice(name) for name in opened.keys()}  # noqa: SIM118 (not a dict)
            return {name: Stored(tuple(part.get_shape()), part.get_dtype(), file) for name, part in slices.items()}
    except FileNotFoundError as error:
        raise UserError(f"{file} is missing: get the file again, or give another folder") from error
    except (SafetensorError, OSError) as error:
        raise UserError(f"{file} is truncated or corrupt ({error}): get the file again") from error


def _sha256(file: Path) -> bytes:
    digest, buffer = hashlib.sha256(), bytearray(_CHUNK)
    with file.open("rb", buffering=0) as opened:
        while count := opened.readinto(buffer):
            digest.update(memoryview(buffer)[:count])
    return digest.digest()
