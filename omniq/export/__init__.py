# SPDX-License-Identifier: Apache-2.0
"""Export: write finished blocks as a checkpoint, and verify that it holds them.

    formats/       codecs: the layout of one linear
    containers/    the layout of a model on disk
    registry.py    the format names that users type; each is a codec and a container
    restate.py     the same weights on another grid: wider codes, smaller groups
    check.py       refuses a format that cannot hold a scheme or a model
    write.py       writes a checkpoint into a temporary folder, then renames it
    verify/        reads the checkpoint back and compares codes and logits

To add a format, add a codec (``formats/codec.py``) and an entry in ``registry.py``. A runtime that does not read a
Hugging Face folder also needs a container (``containers/container.py``).
"""

from omniq.export.check import check_format
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
    "check_format",
    "check_free",
    "check_output",
    "cast_for_export",
    "earlier_export",
    "export_checkpoint",
    "find_format",
    "mend_companions",
    "verify_checkpoint",
]
