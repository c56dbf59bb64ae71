# SPDX-License-Identifier: Apache-2.0
"""Names of a package that are imported on first use (PEP 562), so that importing the package does not import torch."""

import sys
from collections.abc import Callable, Mapping
from importlib import import_module


def lazy_names(package: str, modules: Mapping[str, str]) -> Callable[[str], object]:
    """Make the module-level ``__getattr__`` of a package.

    Args:
        package: the ``__name__`` of the package.
        modules: for each name, the module that defines it.

    Returns:
        A function that imports the module of a name and stores the object as an attribute of the package.
    """

    def __getattr__(name: str) -> object:
        if name not in modules:
            raise AttributeError(f"module {package!r} has no attribute {name!r}")
        value = getattr(import_module(modules[name]), name)
        setattr(sys.modules[package], name, value)
        return value

    return __getattr__
