# SPDX-License-Identifier: Apache-2.0
"""GGUF files (version 3): typed metadata by key, and tensors by name.

    magic "GGUF", version, number of tensors, number of keys
    keys       name, type, value
    tensors    name, number of dimensions, dimensions (the fastest first), type, offset
    data       each tensor at a multiple of 32 bytes

Source: docs/gguf.md of ggml. The package ``gguf`` reads such files too, but omniq needs its own reader: the package
parses each string of a vocabulary into an array, and its releases refuse files with types that they do not know, such
as ``Q2_0``. All values are little-endian.

Shapes are in the order of torch: the last dimension is the fastest.
"""

import mmap
import shutil
import struct
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from omniq.errors import CorruptFile
from omniq.export.containers.shards import writing

ALIGNMENT = 32  # bytes; the default of the format, which a file without the key general.alignment has
_MAGIC, _VERSION = b"GGUF", 3
_TEXT, _ARRAY, _BOOL, _U32, _F32 = 8, 9, 7, 4, 6
_FORMATS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
I32 = 5


@dataclass(frozen=True)
class Value:
    """A value of the metadata.

    Args:
        type: the number of its type in the format.
        value: a number, a truth value or bytes; for an array, the type of the items and a list of them.
    """

    type: int
    value: Any

    @classmethod
    def text(cls, value: str) -> "Value":
        return cls(_TEXT, value.encode())

    @classmethod
    def integer(cls, value: int) -> "Value":
        return cls(_U32, value)

    @classmethod
    def real(cls, value: float) -> "Value":
        return cls(_F32, value)

    @classmethod
    def flag(cls, value: bool) -> "Value":
        return cls(_BOOL, value)

    @classmethod
    def texts(cls, values: list[str]) -> "Value":
        return cls(_ARRAY, (_TEXT, [value.encode() for value in values]))

    @classmethod
    def numbers(cls, type: int, values: list[Any]) -> "Value":
        """An array of numbers: ``I32`` or ``F32``."""
        return cls(_ARRAY, (type, values))

    def decoded(self) -> Any:
        """The value with bytes as text; a list for an array."""
        value = self.value[1] if self.type == _ARRAY else self.value
        if isinstance(value, list):
            return [item.decode() if isinstance(item, bytes) else item for item in value]
        return value.decode() if isinstance(value, bytes) else value


F32 = _F32


@dataclass(frozen=True)
class TensorInfo:
    """The description of a tensor: its shape, the number of its type, and the position of its data."""

    shape: tuple[int, ...]
    type: int
    offset: int


class GgufWriter:
    """Writes tensors as they arrive. Their data waits in a second file, because their descriptions come first.

    Args:
        file: the file to create.
    """

    def __init__(self, file: Path) -> None:
        self._file, self._data = file, file.with_name(f"{file.name}.data")
        self._tensors: dict[str, TensorInfo] = {}
        self._size = 0

    def add(self, name: str, shape: tuple[int, ...], type: int, data: Tensor) -> None:
        """Add one tensor.

        Args:
            name: its name in the file.
            shape: number of elements in each dimension.
            type: the number of its type.
            data: its bytes, any dtype and shape.

        Raises:
            UserError: the disk is full.
        """
        content = data.detach().cpu().contiguous().flatten().view(torch.uint8).numpy()
        self._tensors[name] = TensorInfo(shape, type, self._size)
        padding = -content.nbytes % ALIGNMENT
        with writing(self._data), self._data.open("ab") as out:
            out.write(content.data)
            out.write(bytes(padding))
        self._size += content.nbytes + padding

    def close(self, metadata: Mapping[str, Value]) -> int:
        """Write the file; returns the size of all tensors in bytes.

        Raises:
            UserError: the disk is full.
        """
        with writing(self._file):
            with self._file.open("wb") as out:
                out.write(_MAGIC + struct.pack("<IQQ", _VERSION, len(self._tensors), len(metadata)))
                for key, value in metadata.items():
                    out.write(_text(key.encode()) + struct.pack("<I", value.type) + _packed(value.type, value.value))
                for name, info in self._tensors.items():
                    dimensions = struct.pack(f"<I{len(info.shape)}Q", len(info.shape), *reversed(info.shape))
                    out.write(_text(name.encode()) + dimensions + struct.pack("<IQ", info.type, info.offset))
                out.write(bytes(-out.tell() % ALIGNMENT))
                with self._data.open("rb") as data:
                    shutil.copyfileobj(data, out, 1 << 22)
            self._data.unlink()
        return self._size


class GgufReader:
    """Metadata and tensors of a GGUF file; a context manager that keeps the file mapped.

    Args:
        file: the file.

    Raises:
        CorruptFile: the file is missing, is not a GGUF file, is truncated, or has a header that contradicts itself.
    """

    def __init__(self, file: Path) -> None:
        self.file = file
        try:
            with file.open("rb") as opened:
                self._map = mmap.mmap(opened.fileno(), 0, access=mmap.ACCESS_READ)
        except (OSError, ValueError) as error:  # ValueError: the file is empty
            raise CorruptFile(f"{file}: {error}") from error
        if self._map[:4] != _MAGIC:
            raise CorruptFile(f"{file} is not a GGUF file: it starts with {bytes(self._map[:4])!r}")
        self._at = 4
        try:
            self.metadata, self.tensors = self._header()
        except (struct.error, UnicodeDecodeError, KeyError, IndexError, OverflowError) as error:
            raise CorruptFile(f"{file} is truncated, or its header is damaged ({error})") from error
        self._start = self._at + -self._at % ALIGNMENT

    def __enter__(self) -> "GgufReader":
        return self

    def __exit__(self, *_: object) -> None:
        self._map.close()

    @property
    def size(self) -> int:
        """Size of all tensors in bytes, with the padding between them."""
        return len(self._map) - self._start

    def text(self, key: str) -> str:
        """A text of the metadata.

        Raises:
            CorruptFile: the metadata lacks it.
        """
        found = self.metadata.get(key)
        if found is None or found.type != _TEXT:
            raise CorruptFile(f"{self.file} has no text {key} in its metadata")
        return str(found.decoded())

    def data(self, name: str, bits: int) -> Tensor:
        """The bytes of a tensor, uint8, one-dimensional.

        Args:
            name: its name.
            bits: bits of all elements together.

        Raises:
            KeyError: the file has no such tensor.
            CorruptFile: the file ends before the tensor does.
        """
        place = self.place(name, bits)
        return torch.frombuffer(bytearray(self._map[place]), dtype=torch.uint8)

    def place(self, name: str, bits: int) -> slice:
        """The bytes of the file that hold a tensor; arguments and errors as of ``data``."""
        start = self._start + self.tensors[name].offset
        end = start - (-bits // 8)
        if end > len(self._map):
            raise CorruptFile(f"{self.file} is truncated: {name} ends at byte {end} of {len(self._map)}")
        return slice(start, end)

    def _header(self) -> tuple[dict[str, Value], dict[str, TensorInfo]]:
        version, count, keys = self._unpack("<IQQ")
        if version != _VERSION:
            raise CorruptFile(f"{self.file} has version {version} of the GGUF format, which is not {_VERSION}")
        metadata = {}
        for _ in range(keys):
            key, (type,) = self._string().decode(), self._unpack("<I")
            metadata[key] = Value(type, self._value(type))
        tensors = {}
        for _ in range(count):
            name, (dimensions,) = self._string().decode(), self._unpack("<I")
            shape = self._unpack(f"<{dimensions}Q") if dimensions <= 4 else ()  # ggml has at most 4 dimensions
            tensors[name] = TensorInfo(tuple(reversed(shape)), *self._unpack("<IQ"))
        return metadata, tensors

    def _value(self, type: int) -> Any:
        if type == _TEXT:
            return self._string()
        if type != _ARRAY:
            return self._unpack(f"<{_FORMATS[type]}")[0]
        item, count = self._unpack("<IQ")
        if item in (_TEXT, _ARRAY):
            return item, list(self._items(item, count))
        return item, list(self._unpack(f"<{count}{_FORMATS[item]}"))

    def _items(self, type: int, count: int) -> Iterator[Any]:
        for _ in range(count):
            yield self._value(type)

    def _string(self) -> bytes:
        (length,) = self._unpack("<Q")
        found = self._map[self._at : self._at + length]
        if len(found) != length:
            raise IndexError(f"a text of {length} bytes at byte {self._at}")
        self._at += length
        return found

    def _unpack(self, format: str) -> tuple[Any, ...]:
        found = struct.unpack_from(format, self._map, self._at)
        self._at += struct.calcsize(format)
        return found


def _text(value: bytes) -> bytes:
    return struct.pack("<Q", len(value)) + value


def _packed(type: int, value: Any) -> bytes:
    if type == _TEXT:
        return _text(value)
    if type != _ARRAY:
        return struct.pack(f"<{_FORMATS[type]}", value)
    item, values = value
    head = struct.pack("<IQ", item, len(values))
    if item in (_TEXT, _ARRAY):
        return head + b"".join(_packed(item, value) for value in values)
    return head + struct.pack(f"<{len(values)}{_FORMATS[item]}", *values)
