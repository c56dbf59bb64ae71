# SPDX-License-Identifier: Apache-2.0
"""The format names that users type; each is a codec and a container. To add a format, add one entry here."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from omniq.errors import UserError
from omniq.export.containers.container import Container
from omniq.export.containers.gguf import GgufFile
from omniq.export.containers.huggingface import HuggingFaceFolder
from omniq.export.formats.compressed_tensors import CompressedTensors
from omniq.export.formats.ggml import Ggml
from omniq.export.formats.omniq import Omniq
from omniq.grid.scheme import Scheme


@dataclass(frozen=True)
class Format:
    """A layout of a quantized model on disk.

    Args:
        name: the name that users type. A runtime may use another name for the layout, or one name for several formats.
        codec: creates the codec for a scheme.
        container: the layout of the model.
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
        Format("gguf", Ggml, GgufFile()),
    )
}


def find_format(name: str) -> Format:
    """Find a format by name.

    Raises:
        UserError: the name is unknown; lists the known names.
    """
    if name not in FORMATS:
        raise UserError(f"export format {name!r} is not known: choose one of {', '.join(sorted(FORMATS))}")
    return FORMATS[name]


def container_of(path: Path) -> Container[Any] | None:
    """The container of an omniq export in a folder; None if the folder is not such an export."""
    return next((format.container for format in FORMATS.values() if format.container.is_ours(path)), None)
