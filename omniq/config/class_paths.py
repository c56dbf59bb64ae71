# SPDX-License-Identifier: Apache-2.0
"""Which classes a configuration may name: those of omniq, of Lightning, and of packages that the user allows.

A configuration may come from another person, and a class path makes Python import a module and call an object in it.
omniq therefore refuses a path outside the allowed packages before it imports the module, and requires that a path
inside them names a subclass of the type that the setting expects. The user allows a package with the option
``--allow_import PACKAGE``, with the environment variable ``OMNIQ_ALLOW_IMPORT`` (names separated by commas), or in
Python with ``allow_import=["package"]``. A configuration file cannot allow a package.
"""

import inspect
import os
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import Any, get_type_hints

from jsonargparse import Namespace, set_parsing_settings
from jsonargparse._common import parsing_settings

from omniq.errors import UserError

OWN_PACKAGES = ("omniq", "lightning")
VARIABLE = "OMNIQ_ALLOW_IMPORT"


@contextmanager
def allowed_imports(packages: Sequence[str] = ()) -> Iterator[None]:
    """Restrict jsonargparse to class paths of the allowed packages.

    Args:
        packages: packages to allow in addition to omniq, Lightning and the packages of the environment variable.

    Raises:
        UserError: a name is not a valid package name, or is jsonargparse.
    """
    named = [*packages, *filter(None, os.environ.get(VARIABLE, "").replace(",", " ").split())]
    for name in named:
        if not all(part.isidentifier() for part in name.split(".")) or name.split(".")[0] == "jsonargparse":
            raise UserError(f"allow_import {name!r} is not possible: give the name of your package, such as my_package")
    # jsonargparse has no public way to restore its settings, and this process may use other parsers.
    before = dict(parsing_settings)
    try:
        set_parsing_settings(
            import_path_denylist=["*"],
            import_path_allowlist=[*OWN_PACKAGES, *named],
            instantiate_subclass_spec_in_any=False,
        )
        yield
    finally:
        parsing_settings.update(before)


def check_factory(setting: str, value: Any, expected: type) -> None:
    """Refuse a factory that is neither a subclass of a type nor a function annotated to return that type.

    jsonargparse accepts any function as a factory, and immediately calls a function that has ``init_args``.

    Args:
        setting: name of the setting, for the message.
        value: the parsed value: a class path with arguments, or a function.
        expected: the required type.

    Raises:
        UserError: names the setting, the class path and the type.
    """
    path = value.get("class_path") if isinstance(value, Namespace) else None
    made = value if path is None else loaded_object(path)
    if path is None and not inspect.isclass(made):
        with suppress(TypeError, NameError):  # a builtin has no annotations
            made = get_type_hints(made).get("return")
    if not inspect.isclass(made) or not issubclass(made, expected):
        name = path or getattr(value, "__qualname__", repr(value))
        raise UserError(
            f"{setting}: {name} is neither a subclass of {expected.__name__} nor a function annotated to return "
            f"one: give the class path of a {expected.__name__}"
        )


def loaded_object(path: str) -> Any:
    """Return the object that a class path names if its module is already imported, else None."""
    module, _, name = path.rpartition(".")
    return getattr(sys.modules.get(module), name, None)
