# SPDX-License-Identifier: Apache-2.0
"""Which classes a configuration may name: those of omniq, of Lightning, and of packages that the user allows.

A configuration may come from somebody else, and a class path makes Python import a module and call what it holds. So a
path outside the allowed packages is refused before it is imported, and a path inside them must name a subclass of the
type that its setting expects. Packages are allowed by the option
``--allow_import PACKAGE``, by the environment variable ``OMNIQ_ALLOW_IMPORT`` (names with commas between), or in Python
by ``allow_import=["package"]``; never by a configuration file.
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
    """Let jsonargparse import class paths of the allowed packages only.

    Args:
        packages: beside omniq, Lightning and those of the environment variable.

    Raises:
        UserError: a name is not that of a package.
    """
    named = [*packages, *filter(None, os.environ.get(VARIABLE, "").replace(",", " ").split())]
    for name in named:
        if not all(part.isidentifier() for part in name.split(".")) or name.split(".")[0] == "jsonargparse":
            raise UserError(f"allow_import {name!r} is not possible: give the name of your package, such as my_package")
    before = dict(parsing_settings)  # jsonargparse has no other way to end a policy, and this process may have parsers
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
    """Refuse a factory that is neither a subclass of a type nor the name of a function annotated to return one.

    jsonargparse accepts any function in the place of a factory, and calls a function that has ``init_args`` at once.

    Args:
        setting: where it stands, for the message.
        value: what was parsed: a class path with arguments, or a function.
        expected: the type.

    Raises:
        UserError: names the setting, the class path and the type.
    """
    path = value.get("class_path") if isinstance(value, Namespace) else None
    made = value if path is None else imported(path)
    if path is None and not inspect.isclass(made):
        with suppress(TypeError, NameError):  # a builtin has no annotations
            made = get_type_hints(made).get("return")
    if not inspect.isclass(made) or not issubclass(made, expected):
        name = path or getattr(value, "__qualname__", repr(value))
        raise UserError(
            f"{setting}: {name} is not a subclass of {expected.__name__}, nor the name of a function annotated to "
            f"return one: give the class path of a {expected.__name__}"
        )


def imported(path: str) -> Any:
    """What a class path names, if its module has been imported; else None."""
    module, _, name = path.rpartition(".")
    return getattr(sys.modules.get(module), name, None)
