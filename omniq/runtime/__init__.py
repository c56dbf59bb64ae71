# SPDX-License-Identifier: Apache-2.0
"""The reader of omniq's own checkpoints, inside transformers.

    import omniq
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(path)  # codes stay packed, weights are made as they are needed
    model = model.dequantize()                          # a stock model, from then on

transformers keeps a registry of quantization methods, ``transformers.quantizers.auto``. Its import takes seconds, and
``import omniq`` must not, so ``install`` waits for it. The order of the two imports does not matter.

    quantizer.py   what is registered: the config and the quantizer
    linear.py      the linear that a quantized one is replaced by
"""

import sys
from importlib import import_module, util
from types import SimpleNamespace
from typing import Any

_REGISTRY = "transformers.quantizers.auto"


def register() -> None:
    """Make ``quant_method: omniq`` known to transformers; a second call does nothing."""
    import_module("omniq.runtime.quantizer")


def install() -> None:
    """Register now if transformers' registry is imported already, or else right after its import.

    For the latter a finder is put at the head of ``sys.meta_path``. It answers to the registry's name only: it removes
    itself, lets the other finders find the module, and has ``register`` called after the module's code.
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
