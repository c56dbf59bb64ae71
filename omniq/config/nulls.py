# SPDX-License-Identifier: Apache-2.0
"""Null in the place of a setting that must have a value, found before anything is made of it."""

import inspect
from collections.abc import Callable, Mapping
from dataclasses import is_dataclass
from types import NoneType
from typing import Any, get_args, get_type_hints

from omniq.config.class_paths import imported
from omniq.errors import UserError


def check_nulls(settings: Mapping[str, Any], target: Callable[..., Any], prefix: str = "") -> None:
    """Refuse null for the parameters of a class or function that do not accept None, and inside their own settings.

    Args:
        settings: by name of the parameter; unknown names are left to the parser.
        target: the class or function.
        prefix: of the names in messages.

    Raises:
        UserError: names the setting.
    """
    hints = _hints(target)
    for name, value in settings.items():
        if name in hints:
            _check(value, hints[name], f"{prefix}{name}")


def null_error(name: str) -> UserError:
    """The error about a setting that is null."""
    return UserError(f"{name}: null is not a value of this setting: give one, or leave the line out")


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
            owner, inside = imported(value["class_path"]), value.get("init_args") or {}
        if inspect.isclass(owner) and isinstance(inside, Mapping):
            check_nulls(inside, owner, f"{name}.")


def _hints(target: Callable[..., Any]) -> dict[str, Any]:
    """Annotations of the parameters; none where they name what is imported for type checkers only."""
    try:
        return get_type_hints(target.__init__ if inspect.isclass(target) else target)
    except (NameError, TypeError):
        return {}
