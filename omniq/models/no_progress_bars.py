# SPDX-License-Identifier: Apache-2.0
"""No progress bars of the libraries that read a model: a run has a display of its own.

transformers has a switch for its bars, but reading a GGUF file shows one whatever it says. compressed-tensors shows
three for every model it opens and one more when that model runs for the first time, and takes no argument to leave
them out. All of them are tqdm's, so that is where they are disabled; what is printed, warned and raised comes through.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from tqdm import tqdm


@contextmanager
def without_bars() -> Iterator[None]:
    """Disable every tqdm bar that is made meanwhile, notebook widgets included."""
    original, call = vars(tqdm)["__init__"], tqdm.__init__

    def disabled(bar: tqdm, *args: Any, **options: Any) -> None:
        call(bar, *args, **{**options, "disable": True})

    tqdm.__init__ = disabled
    try:
        yield
    finally:
        tqdm.__init__ = original
