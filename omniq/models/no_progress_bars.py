# SPDX-License-Identifier: Apache-2.0
"""Hide the progress bars of the libraries that read a model: a run has its own display.

transformers has a switch for its bars, but reading a GGUF file ignores it. compressed-tensors shows three bars for
every model it opens and one more when that model runs for the first time, and has no switch. All of them are bars of
tqdm, so this module disables them there. Printed text, warnings and errors are not affected.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from tqdm import tqdm


@contextmanager
def without_bars() -> Iterator[None]:
    """Disable every tqdm bar that is created inside the context, notebook widgets included."""
    original, call = vars(tqdm)["__init__"], tqdm.__init__

    def disabled(bar: tqdm, *args: Any, **options: Any) -> None:
        call(bar, *args, **{**options, "disable": True})

    tqdm.__init__ = disabled
    try:
        yield
    finally:
        tqdm.__init__ = original
