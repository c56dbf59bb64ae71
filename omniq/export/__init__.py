# SPDX-License-Identifier: Apache-2.0
"""Export: finished blocks to a checkpoint on disk, and the proof that it holds them.

    formats/       codecs: the layout of one linear
    containers/    the layout of a model on disk
    registry.py    the names that users type, each a codec and a container
    write.py       writes a checkpoint beside its place, then renames it
    verify/        reads it back and compares codes and logits

A new format is a codec (``formats/codec.py``) and an entry in ``registry.py``. A runtime that does not read the folder
of Hugging Face needs a container too (``containers/container.py``).
"""

from omniq.export.containers.container import cast_for_export
from omniq.export.output_folder import check_free, check_output, earlier_export
from omniq.export.registry import FORMATS, Format, find_format
from omniq.export.verify.checkpoint import Report, VerificationError, verify_checkpoint
from omniq.export.verify.reopened import ReopenedCheckpoint
from omniq.export.write import export_checkpoint, mend_companions

__all__ = [
    "FORMATS",
    "Format",
    "ReopenedCheckpoint",
    "Report",
    "VerificationError",
    "check_free",
    "check_output",
    "cast_for_export",
    "earlier_export",
    "export_checkpoint",
    "find_format",
    "mend_companions",
    "verify_checkpoint",
]
