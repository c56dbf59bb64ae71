# SPDX-License-Identifier: Apache-2.0
"""Sealed files: written atomically, with a checksum that reveals any later change.

Each file is written under a temporary name, flushed and renamed, and then its folder is flushed. A file that is written
later is therefore never on the disk without the earlier ones. Tensors are stored in safetensors files whose metadata
holds a SHA-256 over the whole content. Python state is stored as a digest followed by the output of ``torch.save``.
``omniq.storage.records`` handles records in JSON.
"""

import hashlib
import io
import json
import pickle
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from omniq.errors import CorruptFile
from omniq.grid.dtypes import CODES, dtype_name
from omniq.storage.atomic import atomic_write


@dataclass(frozen=True)
class Owner:
    """The run that a file belongs to and the path of the file in it. The seal of the file covers both.

    Args:
        name: run and path, such as ``3f2a…/blocks/007.safetensors``; empty for a file outside a run.
        strict: refuse a file without an owner. Runs of omniq 0.1 wrote such files.
    """

    name: str = ""
    strict: bool = False

    def accepts(self, found: str) -> bool:
        """Return whether a file with the owner ``found`` may be read."""
        return found == self.name or (not found and not self.strict)


NO_OWNER = Owner()


def save_tensors(path: Path, tensors: Mapping[str, Tensor], head: Mapping[str, str], owner: Owner = NO_OWNER) -> None:
    """Write tensors and a few strings, sealed by a checksum."""
    head = {**head, "owner": owner.name} if owner.name else head
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    tensors = dict(sorted(tensors.items(), key=lambda item: -item[1].element_size()))  # aligns every tensor
    header = _header(tensors, {**head, "sha256": _digest(tensors, head)})
    atomic_write(path, header, *(_bytes(tensor) for tensor in tensors.values()))


def load_tensors(path: Path, owner: Owner | None = None) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Read what ``save_tensors`` wrote.

    Args:
        path: the file.
        owner: the required owner of the file. By default any owner is accepted.

    Raises:
        CorruptFile: the file is truncated or altered, has another format, or belongs to another owner.
    """
    try:
        with safe_open(path, "pt") as file:
            head = dict(file.metadata() or {})
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a dict)
    except (SafetensorError, OSError) as error:
        raise CorruptFile(f"{path}: {error}") from error
    if head.pop("sha256", None) != _digest(tensors, head):
        raise CorruptFile(f"{path}: the checksum does not match its content")
    found = head.pop("owner", "")
    if owner is not None and not owner.accepts(found):
        raise CorruptFile(f"{path}: the file belongs to another run or to another path in this run")
    return tensors, head


def save_state(path: Path, state: Any, owner: Owner = NO_OWNER) -> None:
    """Write Python state (tensors, numbers, strings, containers), sealed by a checksum."""
    buffer = io.BytesIO()
    torch.save(state, buffer)
    atomic_write(path, _state_digest(buffer.getbuffer(), owner.name), buffer.getbuffer())


def load_state(path: Path, map_location: Any = "cpu", owner: Owner = NO_OWNER) -> Any:
    """Read what ``save_state`` wrote. Only plain containers and tensors are unpickled.

    Raises:
        CorruptFile: the file is truncated or altered, belongs to another owner, or holds other objects.
    """
    data = path.read_bytes()
    names = (name for name in (owner.name, "") if owner.accepts(name))
    if data[:32] not in [_state_digest(memoryview(data)[32:], name) for name in names]:
        raise CorruptFile(f"{path}: the checksum does not match its content, its run and its path there")
    try:
        return torch.load(io.BytesIO(memoryview(data)[32:]), map_location=map_location, weights_only=True)
    except pickle.UnpicklingError as error:  # for example, the state of a callback with custom objects
        raise CorruptFile(f"{path}: it holds objects that cannot be read back safely") from error


def _state_digest(data: memoryview, owner: str) -> bytes:
    digest = hashlib.sha256(owner.encode())
    digest.update(data)
    return digest.digest()


def _digest(tensors: Mapping[str, Tensor], head: Mapping[str, str]) -> str:
    digest = hashlib.sha256(json.dumps(dict(head), sort_keys=True).encode())
    for name in sorted(tensors):
        digest.update(f"{name} {tensors[name].dtype} {list(tensors[name].shape)}".encode())
        digest.update(_bytes(tensors[name]))
    return digest.hexdigest()


def _header(tensors: Mapping[str, Tensor], head: Mapping[str, str]) -> bytes:
    """Make the header of a safetensors file. The safetensors library would copy all tensors before it writes them."""
    entries: dict[str, Any] = {"__metadata__": dict(head)}
    end = 0
    for name, tensor in tensors.items():
        begin, end = end, end + tensor.nbytes
        code = CODES[dtype_name(tensor.dtype)]
        entries[name] = {"dtype": code, "shape": list(tensor.shape), "data_offsets": [begin, end]}
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # aligns the data
    return len(text).to_bytes(8, "little") + text


def _bytes(tensor: Tensor) -> memoryview:
    """Return the content of a contiguous CPU tensor without a copy."""
    return tensor.flatten().view(torch.uint8).numpy().data
