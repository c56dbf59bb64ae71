# SPDX-License-Identifier: Apache-2.0
"""All kinds of equivalences. To add one, add a file here and its kind to ``omniq.transforms.let.KINDS``."""

from omniq.transforms.equivalences.norm_to_linears import NormToLinears
from omniq.transforms.equivalences.query_key import QueryKey
from omniq.transforms.equivalences.up_to_down import UpToDown
from omniq.transforms.equivalences.value_to_output import ValueToOutput

__all__ = ["NormToLinears", "QueryKey", "UpToDown", "ValueToOutput"]
