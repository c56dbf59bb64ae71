# SPDX-License-Identifier: Apache-2.0
"""Reading GGUF files, which transformers does: errors in one line, no bars, and nothing computed twice.

transformers parses a file once for the config, once for the weights and once for the tokenizer, and each time goes
through the whole vocabulary, string by string; and it makes gguf's table of tensor names anew for every module of the
model. Both are pure functions of their arguments, and each takes seconds. So while a file is read, what the gguf
package has answered once it answers from memory.
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
_ONE_AT_A_TIME = threading.RLock()  # what two threads put back in turn would be what the other has put there


@contextmanager
def reading_gguf(file: Path) -> Iterator[None]:
    """While transformers reads a GGUF file, show no bar, parse it once, and turn its many errors into one line.

    What is read together is best read inside one of these: they can be nested. Of several threads one reads at a time.

    Raises:
        UserError: a package is missing, or the file, which is named, cannot be read.
    """
    missing = [name for name in ("gguf", "accelerate") if importlib.util.find_spec(name) is None]
    if missing:
        raise UserError(f"reading {file} needs the packages {', '.join(missing)}: pip install {' '.join(missing)}")
    try:
        with _ONE_AT_A_TIME, without_bars(), _remembering():
            yield
    except UserError:
        raise
    except Exception as error:
        raise UserError(
            f"{file} cannot be read as a GGUF model ({one_line(error)}): get the file again, or take the "
            "model's safetensors"
        ) from error


@contextmanager
def _remembering() -> Iterator[None]:
    """Let the gguf package answer from memory what it was asked before; afterwards nothing of it is kept."""
    package = importlib.import_module("gguf")
    plain = {name: getattr(package, name) for name in _PURE}
    try:
        for name, function in plain.items():
            setattr(package, name, functools.cache(function))
        yield
    finally:
        for name, function in plain.items():
            setattr(package, name, function)
