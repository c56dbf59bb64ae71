# SPDX-License-Identifier: Apache-2.0
"""Find null in a setting that needs a value, before any object is constructed from it."""

import inspect
from collections.abc import Callable, Mapping
from dataclasses import is_dataclass
from types import NoneType
from typing import Any, get_args, get_type_hints

from omniq.config.class_paths import loaded_object
from omniq.errors import UserError


def check_nulls(settings: Mapping[str, Any], target: Callable[..., Any], prefix: str = "") -> None:
    """Refuse null for every parameter of a class or function that does not accept None, including nested settings.

    Args:
        settings: values by parameter name. The parser reports unknown names.
        target: the class or function.
        prefix: prefix of the names in messages.

    Raises:
        UserError: names the setting.
    """
    hints = _hints(target)
    for name, value in settings.items():
        if name in hints:
            _check(value, hints[name], f"{prefix}{name}")


def null_error(name: str) -> UserError:
    """Make the error about a setting that is null."""
    return UserError(f"{name}: null is not allowed: give a value or remove the line")


def _check(value: Any, hint: Any, name: str) -> None:
    choices = get_args(hint) or (hint,)
    if value is None:
        if hint is not Any and NoneType not in choices:
            raise null_error(name)
    elif isinstance(value, list):
        for number, entry in enumerate(value):
            _check(entry, choices[0], f"{name}.{number}")
    elif isinstance(value, Mapping):
        owner = next((choice for choice in choices if is_dataclass(choice)), None)
        inside = value
        if isinstance(value.get("class_path"), str):
            owner, inside = loaded_object(value["class_path"]), value.get("init_args") or {}
        if inspect.isclass(owner) and isinstance(inside, Mapping):
            check_nulls(inside, owner, f"{name}.")


def _hints(target: Callable[..., Any]) -> dict[str, Any]:
    """Return the annotations of the parameters; empty if one of them uses a name imported for type checkers only."""
    try:
        return get_type_hints(target.__init__ if inspect.isclass(target) else target)
    except (NameError, TypeError):
        return {}
