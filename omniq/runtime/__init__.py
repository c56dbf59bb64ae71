# SPDX-License-Identifier: Apache-2.0
"""The reader of omniq's own checkpoints, inside transformers.

    import omniq
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(path)  # codes stay packed, weights are made as they are needed
    model = model.dequantize()                          # a stock model, from then on

transformers keeps a registry of quantization methods, ``transformers.quantizers.auto``, which others may add to. That
module takes seconds to import, and ``import omniq`` must not. So ``install`` registers at once only where the registry
is there already; else it waits: a finder at the head of ``sys.meta_path`` lets the registry be found and run as ever,
and registers when its code is through. It touches no other import, and the order of the two imports does not matter.

    quantizer.py   what is registered: the config and the quantizer
    linear.py      the linear that a quantized one is replaced by
"""

import sys
from collections.abc import Sequence
from importlib import import_module
from types import ModuleType
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from importlib.machinery import ModuleSpec

_REGISTRY = "transformers.quantizers.auto"


def register() -> None:
    """Make ``quant_method: omniq`` known to transformers; once is enough, more does no harm."""
    import_module("omniq.runtime.quantizer")


def install() -> None:
    """Register now if transformers is there, or else as soon as its registry is imported."""
    if _REGISTRY in sys.modules:
        register()
    elif _AfterImport not in sys.meta_path:
        sys.meta_path.insert(0, _AfterImport)


class _AfterImport:
    """Finds the registry by the finders behind it, and has it followed by ``register``; finds nothing else."""

    @classmethod
    def find_spec(cls, name: str, path: Sequence[str] | None, target: ModuleType | None = None) -> "ModuleSpec | None":
        if name != _REGISTRY:
            return None
        others = (finder for finder in sys.meta_path if finder is not cls)
        spec = next((found for finder in others if (found := finder.find_spec(name, path, target))), None)
        if spec is not None and spec.loader is not None:
            execute = spec.loader.exec_module

            def execute_and_register(module: ModuleType) -> None:
                execute(module)
                register()

            spec.loader.exec_module = execute_and_register  # type: ignore[method-assign]  # of this one loader
        return spec
