# SPDX-License-Identifier: Apache-2.0
"""Presets: recipes by name, which fit the scheme and the model of a run.

A preset is a file of ``configs/``, which the wheel contains as ``omniq/configs/``. Of these files, the first that
exists gives the stages of ``--preset best --scheme.name W3A16g64``:

    best-w3a16g64.yaml      the same scheme
    best-w3a16.yaml         the same bits
    best.yaml               any scheme; best-activations.yaml if the scheme quantizes activations

The file is the first layer of the composition (``omniq.config.compose``), so all files and options of the user
override it. A run that gives no text calibrates on ``configs/data/c4.yaml``. A run that gives no scheme has 4-bit
weights, in the largest usual groups that divide the inputs of all linear layers of the model.
"""

import os
import re
from collections.abc import Mapping, Sequence
from contextlib import suppress
from math import gcd
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from omniq.config import yaml_text
from omniq.config.compose import compose
from omniq.errors import UserError
from omniq.grid.name import parse_scheme

if TYPE_CHECKING:
    from omniq.config.run import Model

PRESETS = ("fast", "balanced", "best")
DEFAULT_PRESET = "balanced"
DEFAULT_BITS, GROUP_SIZES = "W4A16", (128, 64, 32)  # the groups for which runtimes have kernels, largest first
RECIPES = Path(__file__).parents[1] / "configs"


def preset_of(content: Mapping[str, Any], options: Sequence[str], named: str | None) -> str | None:
    """Return the preset of a run: the one that the user names, or the default if no list of stages is given.

    Args:
        content: the settings of the user's files.
        options: the user's options.
        named: the value of ``--preset``.

    Raises:
        UserError: there is no preset of this name.
    """
    if named is not None and named not in PRESETS:
        raise UserError(f"--preset {named!r} is unknown: give {', '.join(PRESETS[:-1])} or {PRESETS[-1]}")
    given = "stages" in content or any(re.match(r"--stages\+?(=|$)", option) for option in options)
    return DEFAULT_PRESET if named is None and not given else named


def compose_preset(
    preset: str, scheme: str, configs: Sequence[str | Path], settings: Mapping[str, Any], options: Sequence[str]
) -> dict[str, Any]:
    """Merge a preset for a scheme, the user's files in order, and further settings.

    Raises:
        UserError: a file cannot be read, or the user gives another list of stages.
    """
    content, recipe = compose(configs, settings), recipe_of(preset, scheme)
    layers: list[str | Path] = [recipe]
    data = content.get("data")
    if not (isinstance(data, Mapping) and "source" in data) and _option(options, "--data.source", "--data") is None:
        layers.append(RECIPES / "data" / "c4.yaml")
    composed = compose([*layers, *configs], settings)
    replaced = "stages" in content and composed["stages"] == content["stages"]
    if replaced or _option(options, "--stages") is not None:
        raise UserError(f"--preset {preset} and stages: both give a list of stages; remove one of them")
    named = content.get("scheme")
    if not (isinstance(named, Mapping) and "name" in named):
        composed["scheme"] = {**composed["scheme"], "name": scheme}
    return composed


def recipe_of(preset: str, scheme: str) -> Path:
    """Return the file of a preset for a scheme.

    Raises:
        UserError: the name of the scheme is not valid.
    """
    bits = parse_scheme(scheme)
    plain = bits.activation_bits == bits.kv_bits == 16
    same_bits = scheme.lower().partition("g")[0]
    for name in (f"{preset}-{scheme.lower()}", f"{preset}-{same_bits}"):
        if (file := RECIPES / f"{name}.yaml").is_file():
            return file
    return RECIPES / (f"{preset}.yaml" if plain else f"{preset}-activations.yaml")


def scheme_given(content: Mapping[str, Any], options: Sequence[str]) -> str | None:
    """Return the name of the scheme that the user gives, or None. The parser checks it later."""
    name = _option(options, "--scheme.name")
    sections = [content.get("scheme")]
    with suppress(yaml.YAMLError, ValueError):
        sections.insert(0, yaml_text.load(_option(options, "--scheme") or ""))
    for section in sections:
        if name is None and isinstance(section, Mapping) and "name" in section:
            name = str(section["name"])
    return name


def fitting_scheme(model: "Model") -> str:
    """Return the scheme for a model if the user gives none. The group size divides the inputs of all linear layers.

    Raises:
        UserError: the model cannot be opened.
    """
    from omniq.models.source import SourceModel  # imports torch and transformers

    source = SourceModel.open(
        model.path, model.gguf_file, attention=model.attention, trust_remote_code=model.trust_remote_code
    )
    names = (f"{source.block_name(i)}.{name}" for i in range(source.num_blocks) for name in source.layout(i).linears)
    width = gcd(*(source.shape(f"{name}.weight")[1] for name in names))
    group = next((size for size in GROUP_SIZES if width % size == 0), None)
    return DEFAULT_BITS if group is None else f"{DEFAULT_BITS}g{group}"


def is_first_process() -> bool:
    """Return whether this is the process that prints messages, before the processes know each other."""
    return (os.environ.get("RANK") or os.environ.get("SLURM_PROCID", "0")) == "0"


def _option(options: Sequence[str], *names: str) -> str | None:
    """Return the last value of the options of these names."""
    found = None
    for option, following in zip(options, [*options, ""][1:], strict=True):
        name, given, value = option.partition("=")
        if name in names:
            found = value if given else following
    return found
