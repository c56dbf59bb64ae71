# SPDX-License-Identifier: Apache-2.0
"""Reads omniq's own checkpoints in transformers.

    import omniq
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(path)  # codes stay packed; weights are dequantized when needed
    model = model.dequantize()                          # converts it to a stock model

transformers keeps a registry of quantization methods, ``transformers.quantizers.auto``. Its import takes seconds, but
``import omniq`` must be fast, so ``install`` registers when transformers is imported. The order of the two imports does
not matter.

    quantizer.py   the config and the quantizer that are registered
    linear.py      the linear that replaces a quantized linear
"""

import sys
from importlib import import_module, util
from types import SimpleNamespace
from typing import Any

_REGISTRY = "transformers.quantizers.auto"


def register() -> None:
    """Register ``quant_method: omniq`` in transformers; a second call does nothing."""
    import_module("omniq.runtime.quantizer")


def install() -> None:
    """Register now if transformers' registry is already imported, or else right after its import.

    In the latter case, a finder at the head of ``sys.meta_path`` handles only the name of the registry. It removes
    itself, lets the other finders find the module, and calls ``register`` after the module has been executed.
    """

    def find_spec(name: str, path: Any, target: Any = None) -> Any:
        spec = None
        if name == _REGISTRY:
            sys.meta_path.remove(finder)
            spec = util.find_spec(name)
            execute = spec.loader.exec_module  # type: ignore[union-attr]  # source files have a loader
            spec.loader.exec_module = lambda module: (execute(module), register())  # type: ignore
        return spec

    finder: Any = SimpleNamespace(find_spec=find_spec)
    register() if _REGISTRY in sys.modules else sys.meta_path.insert(0, finder)
