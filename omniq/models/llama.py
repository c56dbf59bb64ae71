# SPDX-License-Identifier: Apache-2.0
"""The earlier path of ``omniq.models.families.llama``, kept for one release."""

import warnings

from omniq.models.families.llama import LLAMA

__all__ = ["LLAMA"]

warnings.warn("omniq.models.llama has moved: import omniq.models.families.llama", DeprecationWarning, stacklevel=2)
