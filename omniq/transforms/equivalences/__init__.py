# SPDX-License-Identifier: Apache-2.0
"""Every kind of equivalence. A new one is a file beside this one, and its class in ``EQUIVALENCES``."""

from omniq.transforms.equivalence import Equivalence
from omniq.transforms.equivalences.norm_to_linears import NormToLinears
from omniq.transforms.equivalences.query_key import QueryKey
from omniq.transforms.equivalences.up_to_down import UpToDown
from omniq.transforms.equivalences.value_to_output import ValueToOutput

EQUIVALENCES: tuple[type[Equivalence], ...] = (NormToLinears, ValueToOutput, QueryKey, UpToDown)

__all__ = ["EQUIVALENCES", "NormToLinears", "QueryKey", "UpToDown", "ValueToOutput"]
