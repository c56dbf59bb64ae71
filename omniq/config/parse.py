# SPDX-License-Identifier: Apache-2.0
"""YAML files and options to a ``Run``."""

from argparse import ArgumentError
from collections.abc import Callable, Mapping, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

import yaml
from jsonargparse import ArgumentParser, Namespace

from omniq.config.compose import ConfigFile
from omniq.config.run import Run
from omniq.errors import UserError


def command_parser(target: Callable[..., Any], description: str) -> ArgumentParser:
    parser = ArgumentParser(description=description, exit_on_error=False)
    parser.add_argument("--config", action=ConfigFile, help="a YAML file; of several, later ones win")
    if isinstance(target, type):
        parser.add_class_arguments(target, as_group=False)
    else:
        parser.add_function_arguments(target, as_group=False)
    return parser


def parse_run(configs: Sequence[str | Path] = (), settings: Mapping[str, Any] | None = None) -> tuple[Run, str]:
    """The run that these configuration files describe, with further settings on top.

    Returns:
        The run, and its resolved settings as YAML.

    Raises:
        UserError: a key or value that is not understood.
    """
    parser = command_parser(Run, "a quantization run")
    layers = [str(path) for path in configs] + ([yaml.safe_dump(dict(settings))] if settings else [])
    try:
        config = parser.parse_args([argument for layer in layers for argument in ("--config", layer)])
    except ArgumentError as error:
        raise UserError(" ".join(str(error).split())) from error
    return run_of(parser, config)


def run_of(parser: ArgumentParser, config: Namespace) -> tuple[Run, str]:
    """The run that a parsed configuration describes, and its resolved settings as YAML."""
    settings = parser.dump(config, skip_validation=True)
    objects = vars(instantiate(parser, config))
    return Run(**{field.name: objects[field.name] for field in fields(Run)}), settings


def instantiate(parser: ArgumentParser, config: Namespace) -> Namespace:
    try:
        return parser.instantiate(config)
    except (ValueError, TypeError) as error:
        cause: BaseException | None = error
        while cause is not None and not isinstance(cause, UserError):  # of a class that is one choice of several
            cause = cause.__cause__
        raise UserError(str(cause or error)) from error
