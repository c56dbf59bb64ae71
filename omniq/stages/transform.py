# SPDX-License-Identifier: Apache-2.0
"""The earlier path of ``omniq.calibration.fuse``, kept for one release."""

import warnings

from omniq.calibration.fuse import fuse, input_ranges

__all__ = ["fuse", "input_ranges"]

warnings.warn("omniq.stages.transform has moved: import omniq.calibration.fuse", DeprecationWarning, stacklevel=2)
