# SPDX-License-Identifier: Apache-2.0
"""Records of a run in JSON, and the summaries of its finished blocks. This module does not need torch.

A record that a later process relies on is sealed: it holds a SHA-256 of its content. The summary of a block is stored
in the header of its safetensors file (8 bytes with the length of the header, then the header as JSON), so that a report
reads only a few kilobytes per block.
"""

import hashlib
import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from omniq.errors import CorruptFile
from omniq.storage.atomic import atomic_write


def without_non_finite(content: Any) -> Any:
    """Replace every number that is not finite by None in nested containers, because JSON has no infinity."""
    if isinstance(content, Mapping):
        return {key: without_non_finite(value) for key, value in content.items()}
    if isinstance(content, (list, tuple)):
        return [without_non_finite(value) for value in content]
    return None if isinstance(content, float) and not math.isfinite(content) else content


def save_record(path: Path, content: Mapping[str, Any]) -> None:
    """Write a JSON record, sealed by a checksum."""
    atomic_write(path, json.dumps({**content, "sha256": _seal(content)}, indent=1).encode())


def load_record(path: Path) -> dict[str, Any]:
    """Read what ``save_record`` wrote.

    Raises:
        CorruptFile: the record is truncated or altered.
    """
    try:
        content = json.loads(path.read_bytes())
    except (ValueError, RecursionError):
        content = None
    if isinstance(content, dict) and content.pop("sha256", None) == _seal(content):
        return content
    raise CorruptFile(f"{path}: the checksum does not match its content")


def _seal(content: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def finished_blocks(run: Path) -> list[int]:
    """Return the indices of the finished blocks, in ascending order."""
    names = (path.stem for path in (run / "blocks").glob("[0-9]*.safetensors"))
    return sorted(int(name) for name in names if name.isdecimal())  # ignores copies that the user made


def task_name(index: int | None) -> str:
    """Return the first part of the names of files: ``007`` for a block, ``model`` for the whole model."""
    return "model" if index is None else f"{index:03d}"


def block_path(run: Path, index: int | None, suffix: str = "safetensors") -> Path:
    """Return the path of a file of a block or of the model, such as ``blocks/007.safetensors``."""
    return run / "blocks" / f"{task_name(index)}.{suffix}"


def load_summary(path: Path) -> dict[str, Any]:
    """Read the summary in the header of a block result, without the tensors and without a check of their checksum.

    Raises:
        CorruptFile: the file is truncated or is not a block result.
    """
    try:
        with path.open("rb") as file:
            size = int.from_bytes(file.read(8), "little")
            present = path.stat().st_size - 8
            header: Any = json.loads(file.read(size)) if size <= present else None
        ends = [entry["data_offsets"][1] for name, entry in header.items() if name != "__metadata__"]
        summary = json.loads(header["__metadata__"]["summary"])
    except (OSError, ValueError, KeyError, IndexError, TypeError, AttributeError, RecursionError) as error:
        raise CorruptFile(f"{path}: the header is damaged") from error
    if not isinstance(summary, dict) or present != size + max(ends, default=0):
        raise CorruptFile(f"{path}: the file is truncated")
    return summary


def header_digest(path: Path) -> str:
    """Return a SHA-256 over the header of a block result, which holds the checksum of its content.

    Raises:
        CorruptFile: the file cannot be read.
    """
    try:
        with path.open("rb") as file:
            return hashlib.sha256(file.read(int.from_bytes(file.read(8), "little"))).hexdigest()
    except (OSError, OverflowError, MemoryError) as error:
        raise CorruptFile(f"{path}: the header is damaged") from error
