# SPDX-License-Identifier: Apache-2.0
"""Export: finished blocks to checkpoints on disk. One file a format, one entry in ``FORMATS``."""

from omniq.export.containers.huggingface import cast_for_export, export_checkpoint, mend_companions
from omniq.export.containers.output_folder import check_free, check_output, earlier_export
from omniq.export.formats.format import Format
from omniq.export.formats.registry import FORMATS, find_format
from omniq.export.verify.checkpoint import Report, VerificationError, verify_checkpoint
from omniq.export.verify.reopened import ReopenedCheckpoint

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
