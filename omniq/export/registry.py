# SPDX-License-Identifier: Apache-2.0
"""The formats by the names that users type: each is a codec and a container. A new format is one entry here."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from omniq.errors import UserError
from omniq.export.containers.container import Container
from omniq.export.containers.huggingface import HuggingFaceFolder
from omniq.export.formats.compressed_tensors import CompressedTensors
from omniq.export.formats.omniq import Omniq
from omniq.grid.scheme import Scheme


@dataclass(frozen=True)
class Format:
    """One way to lay a quantized model out on disk.

    Args:
        name: as users type it. A runtime may know the layout by another name, and several formats by the same.
        codec: makes the codec for a scheme.
        container: lays out the model.
    """

    name: str
    codec: Callable[[Scheme], Any]
    container: Container[Any]


_FOLDER = HuggingFaceFolder()
FORMATS: dict[str, Format] = {
    format.name: format
    for format in (
        Format("compressed-tensors", CompressedTensors, _FOLDER),
        Format("omniq", Omniq, _FOLDER),
    )
}


def find_format(name: str) -> Format:
    """A format by name.

    Raises:
        UserError: the name is unknown; lists the names that are known.
    """
    if name not in FORMATS:
        raise UserError(f"export format {name!r} is not known: choose one of {', '.join(sorted(FORMATS))}")
    return FORMATS[name]


def container_of(path: Path) -> Container[Any] | None:
    """The container with which omniq has filled a folder; None if it has not."""
    return next((format.container for format in FORMATS.values() if format.container.is_ours(path)), None)
