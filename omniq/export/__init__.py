# SPDX-License-Identifier: Apache-2.0
"""Export: finished blocks to checkpoints on disk. One file a format, one entry in ``FORMATS``."""

from omniq.export.checkpoint import deployed, export_checkpoint, mend_companions
from omniq.export.format import Format
from omniq.export.opened import Opened
from omniq.export.place import check_free, check_output, earlier_export
from omniq.export.registry import FORMATS, find_format
from omniq.export.verify import Report, VerificationError, verify_checkpoint

__all__ = [
    "FORMATS",
    "Format",
    "Opened",
    "Report",
    "VerificationError",
    "check_free",
    "check_output",
    "deployed",
    "earlier_export",
    "export_checkpoint",
    "find_format",
    "mend_companions",
    "verify_checkpoint",
]
