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
from omniq.export.containers.mlx import MlxFolder
from omniq.export.formats.auto_round import AutoRound
from omniq.export.formats.awq import Awq
from omniq.export.formats.compressed_tensors import CompressedTensors
from omniq.export.formats.ggml import Ggml
from omniq.export.formats.gptq import Gptq
from omniq.export.formats.mlx import Mlx
from omniq.export.formats.omniq import Omniq
from omniq.grid.scheme import Scheme


@dataclass(frozen=True)
class Format:
    """A layout of a quantized model on disk.

    Args:
        name: the name that users type. A runtime may use another name for the layout, or one name for several formats.
        codec: creates the codec for a scheme.
        container: the layout of the model.
        groups: the group sizes for which a scale per channel may be repeated, the best first; empty if the format holds
            scales per channel.
        tolerance: largest relative error of the logits that the runtime computes. The default is for runtimes that
            compute as omniq does. Measured there: 0.0.
    """

    name: str
    codec: Callable[[Scheme], Any]
    container: Container[Any]
    groups: tuple[int, ...] = ()
    tolerance: float = 1e-4


_FOLDER = HuggingFaceFolder()
# GPTQModel's kernels of 4 bits multiply in bfloat16. Measured on SmolLM2-135M: 1.4e-2; wrong zero points give about 1.
_PACKED_KERNELS = 0.1
FORMATS: dict[str, Format] = {
    format.name: format
    for format in (
        Format("compressed-tensors", CompressedTensors, _FOLDER),
        Format("omniq", Omniq, _FOLDER),
        Format("gguf", Ggml, GgufFile()),
        Format("mlx", Mlx, MlxFolder(), groups=(128, 64, 32)),
        Format("gptq", Gptq, _FOLDER, groups=(128, 64, 32), tolerance=_PACKED_KERNELS),
        Format("awq", Awq, _FOLDER, groups=(128, 64, 32), tolerance=_PACKED_KERNELS),
        Format("auto-round", AutoRound, _FOLDER, tolerance=_PACKED_KERNELS),
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
