# SPDX-License-Identifier: Apache-2.0
"""Options of a named stage: ``--stages.QuantEase.sweeps 5`` changes this stage at any position in the list.

Without a name, ``--stages.sweeps 5`` changes the last stage. jsonargparse implements that form.
"""

import re
from collections.abc import Mapping, Sequence
from typing import Any

import yaml

from omniq.config import yaml_text
from omniq.config.compose import merge
from omniq.errors import UserError


def apply_stage_options(content: Mapping[str, Any], options: Sequence[str]) -> tuple[dict[str, Any], list[str]]:
    """Apply the options of named stages to the settings; also return the remaining options.

    Raises:
        UserError: the list has no stage or several stages of that name, or an option has no value.
    """
    applied, others, left = dict(content), [], iter(options)
    for option in left:
        found = re.fullmatch(r"--stages\.([A-Z]\w*)\.([\w.]+)(?:=(.*))?", option, re.S)
        if found is None:
            others.append(option)
            continue
        name, key, text = found[1], found[2], found[3]
        if text is None and (text := next(left, None)) is None:
            raise UserError(f"{option} has no value: give one")
        try:
            value = yaml_text.load(text)
        except (yaml.YAMLError, ValueError):
            value = text  # the parser reports which values the setting accepts
        for part in reversed(key.removeprefix("init_args.").split(".")):
            value = {part: value}
        stages = list(applied.get("stages") or [])
        position = _position(stages, name, option)
        stages[position] = merge(stages[position], value)
        applied["stages"] = stages
    return applied, others


def _position(stages: Sequence[Any], name: str, option: str) -> int:
    paths = [stage.get("class_path") if isinstance(stage, Mapping) else stage for stage in stages]
    names = [str(path).rpartition(".")[2] for path in paths]
    if names.count(name) != 1:
        reason = f"has {names.count(name)} stages {name}" if name in names else f"is {', '.join(names) or 'empty'}"
        raise UserError(f"{option}: the list of stages {reason}: name a stage that occurs once, or edit the file")
    return names.index(name)
