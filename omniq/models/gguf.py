# SPDX-License-Identifier: Apache-2.0
"""Reading GGUF files through transformers: errors in one line, no progress bars, no repeated work.

transformers parses a file once for the config, once for the weights and once for the tokenizer, each time through the
whole vocabulary, string by string. It also builds gguf's table of tensor names again for every module of the model.
Both are pure functions of their arguments, and each takes seconds. While a file is read, both are cached.
"""

import functools
import importlib
import importlib.util
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from omniq.errors import UserError, one_line
from omniq.models.no_progress_bars import without_bars

_PURE = ("GGUFReader", "get_tensor_name_map")
_ONE_AT_A_TIME = threading.RLock()  # two threads would each restore the other's patch


@contextmanager
def reading_gguf(file: Path) -> Iterator[None]:
    """While transformers reads a GGUF file: show no bar, parse the file once, and turn its errors into one line.

    The context can be nested; use one around all reads of a file. Threads take turns.

    Raises:
        UserError: a package is missing, or the file, which is named, cannot be read.
    """
    missing = [name for name in ("gguf", "accelerate") if importlib.util.find_spec(name) is None]
    if missing:
        raise UserError(f"reading {file} needs the packages {', '.join(missing)}: pip install {' '.join(missing)}")
    try:
        with _ONE_AT_A_TIME, without_bars(), _cached():
            yield
    except UserError:
        raise
    except Exception as error:
        raise UserError(
            f"{file} cannot be read as a GGUF model ({one_line(error)}): get the file again, or use the "
            "model's safetensors"
        ) from error


@contextmanager
def _cached() -> Iterator[None]:
    """Cache the pure functions of the gguf package; drop the caches afterwards."""
    package = importlib.import_module("gguf")
    plain = {name: getattr(package, name) for name in _PURE}
    try:
        for name, function in plain.items():
            setattr(package, name, functools.cache(function))
        yield
    finally:
        for name, function in plain.items():
            setattr(package, name, function)
