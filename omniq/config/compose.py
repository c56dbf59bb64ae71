# SPDX-License-Identifier: Apache-2.0
"""How configuration files compose: a later file replaces a list or a class whole."""

import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import yaml
from jsonargparse import ActionConfigFile

from omniq.errors import UserError


class ConfigFile(ActionConfigFile):
    """A configuration file on top of earlier settings: a class or a list that it names starts afresh.

    jsonargparse alone would leave another class, and the entries of a list as long as the earlier one, every earlier
    argument of a name that they know.
    """

    def __call__(self, parser: Any, cfg: Any, values: Any, option_string: str | None = None) -> None:
        lists = set(_lists(_content(values)))
        for key in [key for key in cfg.keys(branches=True) if key.replace(".init_args.", ".") in lists]:
            cfg[key] = None  # not popped: the order of the settings stays
        before = cfg.clone()
        super().__call__(parser, cfg, values, option_string)
        classes = {key: path for key, path in before.items() if key.endswith(".class_path")}
        others = [key for key, path in classes.items() if cfg.get(key, path) != path]
        if others:  # short names are resolved only now, so the file is applied again, without the earlier classes
            for key in others:
                if key in before:  # else it was in one of these
                    before[key.removesuffix(".class_path")] = None
            vars(cfg).clear()
            vars(cfg).update(vars(before))
            super().__call__(parser, cfg, values, option_string)


def _content(config: str) -> dict[str, Any]:
    """What a configuration file says, or a text in place of one; its errors name the file, jsonargparse's do not."""
    is_file = config == "-" or os.path.exists(config)
    try:
        content = yaml.safe_load(Path(config).read_text(encoding="utf-8") if is_file else config)
    except OSError as error:
        raise UserError(f"config {config} cannot be read ({error.strerror}): give a YAML file") from error
    except UnicodeDecodeError as error:
        raise UserError(f"config {config} is not UTF-8 text ({error}): save it as UTF-8") from error
    except yaml.YAMLError as error:
        raise UserError(f"config {config} is no valid YAML ({' '.join(str(error).split())}): mend it") from error
    if is_file and not isinstance(content, dict):
        raise UserError(f"config {config} holds no settings: give a YAML file of lines such as `seed: 2`")
    return content if isinstance(content, dict) else {}  # a file that is not there: jsonargparse says so


def _lists(content: Mapping[str, Any], section: str = "") -> Iterator[str]:
    """The dotted keys of all lists, less ``init_args``, which may be left out."""
    for key, value in content.items():
        if isinstance(value, list):
            yield f"{section}{key}"
        elif isinstance(value, dict):
            yield from _lists(value, section if key == "init_args" else f"{section}{key}.")
