# SPDX-License-Identifier: Apache-2.0
"""Text to tokens: where calibration and evaluation text comes from, and the windows cut out of it."""

from omniq.data.text import HubText, LocalText, Stdlib, TextSource
from omniq.data.windows import Calibration, Evaluation, Windows, digest

__all__ = ["Calibration", "Evaluation", "HubText", "LocalText", "Stdlib", "TextSource", "Windows", "digest"]
