# SPDX-License-Identifier: Apache-2.0
"""Safetensors files in shards: written one at a time as tensors arrive, and read tensor by tensor.

File names are those of transformers: ``model.safetensors`` for a single file, or ``model-00002-of-00005.safetensors``
with ``model.safetensors.index.json``. The number of files is known only at the end, so they are renamed then.
"""

import json
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from omniq.errors import CorruptFile, UserError

_INDEX = "model.safetensors.index.json"


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """Convert errors of a full or read-only disk to one-line messages for the user.

    Raises:
        UserError: names the path and the error of the system.
    """
    try:
        yield
    except OSError as error:
        raise _cannot_write(path, error.strerror or str(error)) from error
    except SafetensorError as error:
        raise _cannot_write(path, str(error)) from error
    except Exception as error:  # NOTE: tokenizers raises a plain Exception, "No space left on device (os error 28)"
        if "(os error " not in str(error):
            raise
        raise _cannot_write(path, str(error)) from error


def _cannot_write(path: Path, reason: str) -> UserError:
    return UserError(f"cannot write {path}: {reason}: free space on this disk, or choose another folder")


class ShardWriter:
    """Collects tensors and writes them in shards of limited size.

    Args:
        folder: an existing folder.
        max_bytes: largest size of a shard and of the tensors in memory; a larger tensor gets its own shard.
    """

    def __init__(self, folder: Path, max_bytes: int) -> None:
        if max_bytes < 1:
            raise UserError(f"max_shard_bytes {max_bytes} is too small: give a positive size, such as {2**30}")
        self._folder, self._max_bytes = folder, max_bytes
        self._pending: dict[str, Tensor] = {}
        self._pending_bytes = self._total_bytes = self._files = 0
        self._file_of: dict[str, int] = {}

    @property
    def names(self) -> set[str]:
        """Names of all tensors added so far."""
        return self._file_of.keys() | self._pending.keys()

    def add(self, name: str, tensor: Tensor) -> None:
        """Add one tensor; may write a shard.

        Raises:
            UserError: the disk is full.
            ValueError: a tensor of this name was added before.
        """
        if name in self._file_of or name in self._pending:
            raise ValueError(f"{name} is exported twice")
        size = tensor.numel() * tensor.element_size()
        if self._pending and self._pending_bytes + size > self._max_bytes:
            self._write()
        self._pending[name] = tensor.detach().cpu().contiguous()
        self._pending_bytes += size

    def close(self) -> int:
        """Write the remaining tensors, rename the files to their final names, and add an index for several files.

        Returns:
            size of all tensors in bytes.

        Raises:
            UserError: the disk is full.
        """
        self._write()
        single = self._files == 1
        final = [
            "model.safetensors" if single else f"model-{number:05d}-of-{self._files:05d}.safetensors"
            for number in range(1, self._files + 1)
        ]
        with writing(self._folder):
            for number, name in enumerate(final):
                self._path(number).rename(self._folder / name)
            if not single:
                places = {name: final[number] for name, number in sorted(self._file_of.items())}
                index = {"metadata": {"total_size": self._total_bytes}, "weight_map": places}
                (self._folder / _INDEX).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")
        return self._total_bytes

    def _path(self, number: int) -> Path:
        return self._folder / f"shard-{number:05d}.safetensors"

    def _write(self) -> None:
        path = self._path(self._files)
        with writing(path):
            path.touch()
            mode = path.stat().st_mode  # by the umask; safetensors creates files that only the owner can read
            save_file(self._pending, path, metadata={"format": "pt"})
            path.chmod(mode)
        self._file_of |= dict.fromkeys(self._pending, self._files)
        self._files += 1
        self._total_bytes += self._pending_bytes
        self._pending, self._pending_bytes = {}, 0


class ShardReader:
    """Tensors of an exported folder by name; a context manager that keeps its files open.

    Args:
        folder: contains ``model.safetensors``, or shards and their index.

    Raises:
        CorruptFile: a file is missing or damaged; also raised when a tensor is read.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._open = ExitStack()
        self._files: dict[str, Any] = {}
        self._file_of: dict[str, str]
        index, single = folder / _INDEX, "model.safetensors"
        if not index.exists():
            self._file_of = dict.fromkeys(self._file(single).keys(), single)
            return
        try:
            found = json.loads(index.read_bytes())["weight_map"]
            self._file_of = {str(name): str(file) for name, file in found.items()}
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise CorruptFile(f"{index}: {error}") from error

    def __enter__(self) -> "ShardReader":
        return self

    def __exit__(self, *_: object) -> None:
        self._open.close()

    @property
    def names(self) -> set[str]:
        """Names of all tensors in the folder."""
        return set(self._file_of)

    def __getitem__(self, name: str) -> Tensor:
        file = self._file_of[name]
        try:
            tensor: Tensor = self._file(file).get_tensor(name)
        except SafetensorError as error:
            raise CorruptFile(f"{self._folder / file}: {error}") from error
        return tensor

    @property
    def size(self) -> int:
        """Size of all tensors in bytes: the part of each file after its header, whose length is stored first."""
        total = 0
        for name in set(self._file_of.values()):
            with (self._folder / name).open("rb") as file:
                total += (self._folder / name).stat().st_size - 8 - int.from_bytes(file.read(8), "little")
        return total

    def _file(self, name: str) -> Any:
        if name not in self._files:
            try:
                self._files[name] = self._open.enter_context(safe_open(self._folder / name, "pt"))
            except (SafetensorError, OSError) as error:
                raise CorruptFile(f"{self._folder / name}: {error}") from error
        return self._files[name]


def same_bits(left: Tensor, right: Tensor) -> bool:
    """True for equal dtype, shape and bytes; unlike in ``torch.equal``, -0 differs from 0 and NaN equals itself."""
    if left.dtype != right.dtype or left.shape != right.shape:
        return False
    return torch.equal(left.contiguous().flatten().view(torch.uint8), right.contiguous().flatten().view(torch.uint8))
