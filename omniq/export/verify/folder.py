# SPDX-License-Identifier: Apache-2.0
"""Verify a folder that was exported earlier, in every runtime of this machine.

1. All codes are read. They are compared with the blocks of their run, if the run is at hand. Otherwise the weight files
   must have the digests that omniq recorded when it wrote and verified them.
2. Each runtime that opens the format computes the logits of a text, and omniq computes them from the codes
   (``reference.py``).
"""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from omniq.errors import CorruptFile, UserError, one_line
from omniq.export.containers.container import Reader
from omniq.export.manifest import recorded_digests, weight_digests
from omniq.export.registry import FORMATS, Format, container_of
from omniq.export.verify.checkpoint import read_linear
from omniq.export.verify.reference import Distance, reference_logits
from omniq.export.verify.runtimes import RUNTIMES, Runtime
from omniq.grid.scheme import Scheme


@dataclass(frozen=True)
class Row:
    """The result of one runtime on an export.

    Args:
        runtime: its name.
        lacking: the reason why it did not open the export; None if it did.
        distance: how far its logits are from those of omniq; None if it did not compute any.
    """

    runtime: str
    lacking: str | None = None
    distance: Distance | None = None


def format_of(path: Path) -> Format:
    """The format of an export.

    Raises:
        UserError: the path is not an export of omniq, or has a format that this omniq does not know.
        CorruptFile: the file that records the format is damaged.
    """
    if not path.is_dir():
        what = "is a file" if path.exists() else "does not exist"
        raise UserError(
            f"model {path} {what}: give the folder of an export, with its config or GGUF file and README.md"
        )
    container = container_of(path)
    if container is None:
        files = ", ".join(sorted(entry.name for entry in path.iterdir())[:4]) or "no file"
        raise UserError(
            f"model {path} is not an export of omniq: it holds {files}, but no README.md or recipe.yaml of omniq "
            "beside a config.json or model.gguf; give the folder that omniq wrote"
        )
    name = container.format_of(path)
    if name not in FORMATS:
        raise UserError(f"model {path} has format {name!r}, which this omniq does not know: upgrade omniq")
    return FORMATS[name]


def check_digests(path: Path) -> bool:
    """Compare the weight files with the digests that omniq recorded; False if an older omniq recorded none.

    Raises:
        CorruptFile: names the first file that differs.
    """
    recorded = recorded_digests(path)
    for name, digest in recorded.items():
        if not (path / name).is_file():
            raise CorruptFile(f"{path / name} is missing")
        if weight_digests(path, [name]) != {name: digest}:
            raise CorruptFile(f"{path / name} is not the file that omniq wrote: its SHA-256 differs")
    return bool(recorded)


def count_codes(reader: Reader) -> int:
    """Read every quantized linear; returns the number of their codes.

    Raises:
        VerificationError: a tensor is missing, or cannot be read back.
        CorruptFile: a file is damaged.
    """
    return sum(read_linear(reader, name).codes.numel() for name in sorted(reader.linears))


def chosen_runtimes(format: Format, name: str | None) -> list[Runtime]:
    """The runtimes that open a format, or the one that the user named.

    Raises:
        UserError: the name is unknown, or that runtime does not open the format.
    """
    able = [runtime for runtime in RUNTIMES if format.name in runtime.formats]
    if name is None:
        return able
    if name not in (every := {runtime.name: runtime for runtime in RUNTIMES}):
        raise UserError(f"runtime {name!r} is not known: choose one of {', '.join(every)}")
    if every[name] not in able:
        others = ", ".join(runtime.name for runtime in able)
        raise UserError(f"runtime {name} does not open format {format.name}: choose {others}")
    return [every[name]]


def compare_runtimes(
    path: Path, format: Format, scheme: Scheme, reader: Reader, tokens: Tensor, runtimes: list[Runtime]
) -> Iterator[Row]:
    """Compare the logits of each runtime with those of omniq.

    Args:
        path: the folder.
        format: its format.
        scheme: the scheme of the export.
        reader: the opened folder.
        tokens: int64 ``[t]``.
        runtimes: from ``chosen_runtimes``.
    """
    expected = None
    for runtime in runtimes:
        lacking = runtime.lacking(path, format.name, format.codec(scheme))
        if lacking is not None:
            yield Row(runtime.name, lacking)
            continue
        expected = reference_logits(reader, scheme, tokens, path) if expected is None else expected
        try:
            found = runtime.log_probabilities(path, tokens)
        except Exception as error:  # every runtime raises its own types
            yield Row(runtime.name, f"cannot open it: {one_line(error)}")
            continue
        yield Row(runtime.name, distance=Distance.of(found.cpu().float(), expected.cpu()))
