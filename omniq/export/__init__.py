# SPDX-License-Identifier: Apache-2.0
"""Export: finished blocks to checkpoints on disk. One file a format, one entry in ``FORMATS``."""

from omniq.export.checkpoint import check_output, earlier_export, export_checkpoint
from omniq.export.format import Format
from omniq.export.registry import FORMATS, find_format
from omniq.export.verify import Report, VerificationError, verify_checkpoint

__all__ = [
    "FORMATS",
    "Format",
    "Report",
    "VerificationError",
    "check_output",
    "earlier_export",
    "export_checkpoint",
    "find_format",
    "verify_checkpoint",
]
