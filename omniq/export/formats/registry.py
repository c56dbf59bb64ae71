# SPDX-License-Identifier: Apache-2.0
"""The formats by the names people type. A new one is one file beside this and one entry here."""

from omniq.errors import UserError
from omniq.export.formats.compressed_tensors import CompressedTensors
from omniq.export.formats.format import Format
from omniq.export.formats.omniq import OmniqFormat

FORMATS: dict[str, Format] = {"compressed-tensors": CompressedTensors(), "omniq": OmniqFormat()}


def find_format(name: str) -> Format:
    """A format by name.

    Raises:
        UserError: there is none of that name; lists those there are.
    """
    if name not in FORMATS:
        raise UserError(f"export format {name!r} is not known: choose one of {', '.join(sorted(FORMATS))}")
    return FORMATS[name]
