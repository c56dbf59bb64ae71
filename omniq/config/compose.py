# SPDX-License-Identifier: Apache-2.0
"""The rule of composition: a later file replaces a list or a class as a whole, and everything else key by key.

    earlier file                                later file                      result
    scheme: {name: W4A16, symmetric: true}      scheme: {name: W3A16}           {name: W3A16, symmetric: true}
    stages: [A, B]                              stages: [C]                     [C]
    stages: [A]                                 stages+: [B]                    [A, B]
    source: {class_path: A, init_args: ...}     source: {class_path: A}         {class_path: A}
    source: {class_path: A, init_args: {x: 1}}  source: {init_args: {y: 2}}     {class_path: A, init_args: {x: 1, y: 2}}

A mapping without ``class_path`` changes settings of the class in the earlier file; ``init_args`` may be omitted.
Command-line options apply after all files.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from omniq.config import yaml_text
from omniq.errors import UserError

_CLASS_KEYS = {"class_path", "init_args", "dict_kwargs"}


def compose(configs: Sequence[str | Path], settings: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """Merge configuration files in order, and then further settings.

    Raises:
        UserError: a file cannot be read, or does not contain settings in YAML.
    """
    content: dict[str, Any] = {}
    for layer in [*map(read, configs), dict(settings or {})]:
        content = merge(content, layer)
    return content


def merge(earlier: Any, later: Any) -> Any:
    """Merge ``later`` over ``earlier`` by the rule of this module."""
    if isinstance(earlier, str) and isinstance(later, dict):
        earlier = {"class_path": earlier}  # a class may be given by its class path alone
    if not isinstance(earlier, dict) or not isinstance(later, dict) or "class_path" in later:
        return later
    if _CLASS_KEYS & (earlier.keys() | later.keys()):
        earlier, later = _with_init_args(earlier), _with_init_args(later)
    merged = dict(earlier)
    for key, value in later.items():
        name = key.removesuffix("+") if isinstance(key, str) else key
        if name != key:
            merged[name] = [*_entries(merged.get(name)), *_entries(value)]
        else:
            merged[key] = merge(merged.get(key), value)
    return merged


def _with_init_args(node: dict[str, Any]) -> dict[str, Any]:
    return node if _CLASS_KEYS & node.keys() or not node else {"init_args": node}


def _entries(value: Any) -> list[Any]:
    if value is None:
        return []
    return value if isinstance(value, list) else [value]


def read(config: str | Path) -> dict[str, Any]:
    """Read the settings of a YAML file.

    Raises:
        UserError: the file is missing, cannot be read, or does not contain settings in YAML.
    """
    try:
        text = Path(config).read_text(encoding="utf-8")
    except FileNotFoundError as error:
        raise UserError(f"config {config} does not exist: give a YAML file") from error
    except OSError as error:
        raise UserError(f"config {config} cannot be read ({error.strerror}): give a YAML file") from error
    except ValueError as error:  # not UTF-8, or a null byte in the path
        raise UserError(f"config {config} is not UTF-8 text ({error}): save it as UTF-8") from error
    try:
        content = yaml_text.load(text)
    except (yaml.YAMLError, ValueError) as error:
        raise UserError(f"config {config} is not valid YAML ({' '.join(str(error).split())}): correct it") from error
    if not isinstance(content, dict):
        raise UserError(f"config {config} holds no settings: give a YAML file of lines such as `seed: 2`")
    return content
