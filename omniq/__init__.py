# SPDX-License-Identifier: Apache-2.0
"""omniq quantizes language models block by block.

The public API consists of two functions. Both are imported on first use, so that ``import omniq`` stays fast:

    omniq.quantize(model, ...)    run a recipe, as ``omniq quantize --config`` does
    omniq.load(path)              open the checkpoint of a run

Importing omniq also registers omniq's checkpoint format with transformers (``omniq.runtime``).
"""

from typing import TYPE_CHECKING

from omniq import runtime
from omniq.lazy import lazy_names

__version__ = "0.1.0"
__all__ = ["__version__", "load", "quantize"]

if TYPE_CHECKING:
    from omniq.api import load, quantize
else:  # hidden from type checkers, for which a module-level __getattr__ defines every name
    __getattr__ = lazy_names(__name__, {"load": "omniq.api", "quantize": "omniq.api"})


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


runtime.install()
