# SPDX-License-Identifier: Apache-2.0
"""omniq quantizes language models block by block.

The front door is two functions, fetched on first use so that ``import omniq`` stays fast:

    omniq.quantize(model, ...)    run a recipe, as ``omniq quantize --config`` does
    omniq.load(path)              open what a run has written

Importing omniq also makes transformers able to open checkpoints in omniq's own format (``omniq.runtime``).
"""

from importlib import import_module
from typing import TYPE_CHECKING

from omniq import runtime

__version__ = "0.1.0"
__all__ = ["__version__", "load", "quantize"]

if TYPE_CHECKING:
    from omniq.api import load, quantize
else:  # hidden from type checkers, to whom a module-level __getattr__ says that every name exists

    def __getattr__(name: str) -> object:
        if name in __all__:
            return getattr(import_module("omniq.api"), name)
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


runtime.install()
