# SPDX-License-Identifier: Apache-2.0
"""Files that are either whole or not there, and that know when they were altered.

Everything is written beside its final name, flushed and renamed, and then the new name is flushed: what is written
later is never on the disk without it. Tensors go to safetensors files whose metadata holds
a SHA-256 over all of their content; Python state goes to a digest followed by what ``torch.save`` writes. Records in
JSON: ``omniq.storage.records``.
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
    """The run that a file belongs to, and its place there: the seal of the file covers both.

    Args:
        name: run and place, such as ``3f2a…/blocks/007.safetensors``; empty for a file of no run.
        strict: refuse a file without an owner. Runs of omniq 0.1 wrote such files.
    """

    name: str = ""
    strict: bool = False

    def accepts(self, found: str) -> bool:
        """Whether a file of this owner may be read here."""
        return found == self.name or (not found and not self.strict)


NOBODY = Owner()


def save_tensors(path: Path, tensors: Mapping[str, Tensor], head: Mapping[str, str], owner: Owner = NOBODY) -> None:
    """Write tensors and a few strings, sealed by a checksum."""
    head = {**head, "owner": owner.name} if owner.name else head
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    tensors = dict(sorted(tensors.items(), key=lambda item: -item[1].element_size()))  # so that each one is aligned
    header = _header(tensors, {**head, "sha256": _digest(tensors, head)})
    atomic_write(path, header, *(_bytes(tensor) for tensor in tensors.values()))


def load_tensors(path: Path, owner: Owner | None = None) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Read what ``save_tensors`` wrote.

    Args:
        owner: of the file; any if not given.

    Raises:
        CorruptFile: the file is truncated or altered, was never such a file, or belongs to another owner.
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
        raise CorruptFile(f"{path}: the file belongs to another run or to another place in this run")
    return tensors, head


def save_state(path: Path, state: Any, owner: Owner = NOBODY) -> None:
    """Write Python state (tensors, numbers, strings, containers), sealed by a checksum."""
    buffer = io.BytesIO()
    torch.save(state, buffer)
    atomic_write(path, _state_digest(buffer.getbuffer(), owner.name), buffer.getbuffer())


def load_state(path: Path, map_location: Any = "cpu", owner: Owner = NOBODY) -> Any:
    """Read what ``save_state`` wrote; only plain containers and tensors are unpickled.

    Raises:
        CorruptFile: the file is truncated or altered, belongs to another owner, or holds other objects.
    """
    data = path.read_bytes()
    names = (name for name in (owner.name, "") if owner.accepts(name))
    if data[:32] not in [_state_digest(memoryview(data)[32:], name) for name in names]:
        raise CorruptFile(f"{path}: the checksum does not match its content, its run and its place there")
    try:
        return torch.load(io.BytesIO(memoryview(data)[32:]), map_location=map_location, weights_only=True)
    except pickle.UnpicklingError as error:  # such as the state of a callback that holds more than plain containers
        raise CorruptFile(f"{path}: it holds objects that are not read back safely") from error


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
    """What precedes the tensors in a safetensors file. Written here because the library copies all tensors first."""
    entries: dict[str, Any] = {"__metadata__": dict(head)}
    end = 0
    for name, tensor in tensors.items():
        begin, end = end, end + tensor.nbytes
        code = CODES[dtype_name(tensor.dtype)]
        entries[name] = {"dtype": code, "shape": list(tensor.shape), "data_offsets": [begin, end]}
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # so that the data is aligned
    return len(text).to_bytes(8, "little") + text


def _bytes(tensor: Tensor) -> memoryview:
    """The content of a contiguous tensor on the CPU, not copied."""
    return tensor.flatten().view(torch.uint8).numpy().data
