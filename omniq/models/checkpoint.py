# SPDX-License-Identifier: Apache-2.0
"""Weights by name, without holding the model in memory.

A ``Checkpoint`` knows on opening which tensors it stores (names, shapes, files), and reads those it is asked for.

- safetensors, one file or an index of several: opening reads only headers. A tensor is mapped from its file when it is
  read, so host memory holds the current block, however large the model is.
- GGUF: transformers dequantizes and renames all tensors at once, and they stay in host memory. GGUF models are small:
  large models exist as safetensors.

Opening finds every fault of the files before any work: a header that does not parse, a truncated file (safetensors
compares its length with the header), a shard or a tensor that the index lists and the folder lacks, a tensor that two
shards hold. ``omniq.models.weight_files`` chooses the files; ``omniq.models.prepare`` changes what a checkpoint gives.
"""

import hashlib
import json
from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor
from transformers import AutoModelForCausalLM, PretrainedConfig

from omniq.errors import UserError
from omniq.grid.dtypes import dtype_name
from omniq.models.gguf import reading_gguf
from omniq.models.weight_files import weight_map

_CHUNK = 1 << 22  # bytes hashed at once


@dataclass(frozen=True)
class Stored:
    """A tensor as its file describes it: shape, dtype (a code of safetensors, or a name of torch), and the file."""

    shape: tuple[int, ...]
    dtype: str
    file: Path


class Checkpoint(ABC):
    """An opened checkpoint.

    Args:
        tensors: every tensor it stores, by name.
        files: the weight files.
        description: further bytes of the digest: config.json, or empty if the weight file holds the config.
    """

    def __init__(self, tensors: Mapping[str, Stored], files: Iterable[Path], description: bytes = b"") -> None:
        self.tensors = tensors
        self.files = tuple(sorted(files))
        self._description = description

    @abstractmethod
    def read(self, names: Iterable[str]) -> dict[str, Tensor]:
        """The named tensors, on the CPU, in their stored dtype.

        They may be views of a mapped file: copy them if they outlive the call that reads them.
        """

    def digest(self) -> str:
        """SHA-256 over the config, every tensor's name, shape and dtype, and the content of every weight file."""
        digest = hashlib.sha256(self._description)
        described = [(name, stored.shape, stored.dtype) for name, stored in sorted(self.tensors.items())]
        digest.update(json.dumps(described).encode())
        for file in self.files:
            digest.update(file_digest(file))
        return digest.hexdigest()


class SafetensorsCheckpoint(Checkpoint):
    """One safetensors file, or an index of several. Every read opens the files that it needs and closes them.

    Args:
        folder, name: the file or the index; config.json lies beside it.

    Raises:
        UserError: a file is missing, truncated or not a safetensors file, lacks a tensor that the index lists, or
            holds one that another file holds too.
    """

    def __init__(self, folder: Path, name: str) -> None:
        listed = weight_map(folder, name)
        files = set(listed.values()) or {folder / name}
        tensors: dict[str, Stored] = {}
        for file in sorted(files):
            found = _header(file)
            if twice := next((key for key in found if key in tensors), None):
                raise UserError(
                    f"{tensors[twice].file} and {file} both hold the tensor {twice}: get the files again, or remove "
                    "the tensor from one of them"
                )
            tensors |= found
        for key, file in listed.items():
            if key not in tensors or tensors[key].file != file:
                raise UserError(f"{file} lacks the tensor {key} that {name} lists: get both files again")
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
        config: of the model; the caller has read it from the file (the vocabulary in a GGUF header takes seconds).
        dtype: of the tensors held; they are dequantized in float32 and rounded once.

    Raises:
        UserError: the file does not parse, or transformers does not know its architecture.
    """

    def __init__(self, folder: Path, name: str, config: PretrainedConfig, dtype: torch.dtype = torch.float32) -> None:
        file = folder / name
        with reading_gguf(file):
            model = AutoModelForCausalLM.from_pretrained(folder, gguf_file=name, config=config, dtype=dtype)
        # named_parameters lists a tied tensor once; the state dict leaves out derived buffers (rotary tables).
        names = {key for key, _ in model.named_parameters()} | {key for key, _ in model.named_buffers()}
        self._held = {key: value.detach() for key, value in model.state_dict().items() if key in names}
        label = dtype_name(dtype)
        super().__init__({key: Stored(tuple(value.shape), label, file) for key, value in self._held.items()}, [file])

    def read(self, names: Iterable[str]) -> dict[str, Tensor]:
        return {name: self._held[name] for name in names}


def _header(file: Path) -> dict[str, Stored]:
    try:
        with safe_open(file, "pt") as opened:
            slices = {name: opened.get_slice(name) for name in opened.keys()}  # noqa: SIM118 (not a dict)
            return {name: Stored(tuple(part.get_shape()), part.get_dtype(), file) for name, part in slices.items()}
    except FileNotFoundError as error:
        raise UserError(f"{file} is missing: get the file again, or give another folder") from error
    except (SafetensorError, OSError) as error:
        raise UserError(f"{file} is truncated or corrupt ({error}): get the file again") from error


def file_digest(file: Path) -> bytes:
    digest, buffer = hashlib.sha256(), bytearray(_CHUNK)
    with file.open("rb", buffering=0) as opened:
        while count := opened.readinto(buffer):
            digest.update(memoryview(buffer)[:count])
    return digest.digest()
