# SPDX-License-Identifier: Apache-2.0
"""YAML files and options to a ``Run``, in two passes.

The first pass parses all sections but ``stages``, ``trainer`` and ``callbacks``, whose types take seconds to import. It
prints help and finds most mistakes. The second pass parses all sections; it runs if the first one finds no mistake.
"""

import re
from argparse import ArgumentError
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import MISSING, field, fields, make_dataclass
from importlib import import_module
from pathlib import Path
from typing import Any, NamedTuple

from jsonargparse import ActionConfigFile, ArgumentParser, Namespace

from omniq.config import yaml_text
from omniq.config.class_paths import allowed_imports, check_factory
from omniq.config.compose import compose
from omniq.config.earlier import without_earlier_settings
from omniq.config.nulls import check_nulls, null_error
from omniq.config.run import Run
from omniq.config.stage_options import apply_stage_options
from omniq.errors import UserError

HEAVY = ("stages", "trainer", "callbacks")
"""Sections whose types import torch and Lightning."""

_EPILOG = (
    "Several --config files compose: a later file replaces a list or a class whole, and everything else key by key; "
    "options come after all files. --allow_import PACKAGE lets class paths name classes of that package too, beside "
    "those of omniq and lightning."
)
_RUN = (
    "quantize",
    "Quantize a model and write a checkpoint; the same command continues an interrupted run.",
    " --stages.KEY sets the last stage, --stages.NAME.KEY the stage of that class. --stages.help CLASS, "
    "--callbacks.help CLASS and --trainer.help list the settings of a class.",
)


class Arguments(NamedTuple):
    """A command line, sorted.

    Args:
        configs: the ``--config`` files, in order.
        options: everything else, in order.
        packages: of ``--allow_import``.
    """

    configs: list[str]
    options: list[str]
    packages: list[str]

    @classmethod
    def sort(cls, args: Iterable[str]) -> "Arguments":
        """Sort the arguments of one command.

        Raises:
            UserError: an option that needs a value has none.
        """
        found, left = cls([], [], []), iter(args)
        groups = {"--config": found.configs, "--allow_import": found.packages}
        for argument in left:
            name, given, value = argument.partition("=")
            group = groups.get(name)
            if group is None:
                found.options.append(argument)
                continue
            if not given and (value := next(left, "")) == "":
                example = "mine.yaml" if group is found.configs else "my_package"
                raise UserError(f"{name} has no value: give one, such as {name} {example}")
            group.append(value)
        return found


def parse_run(
    configs: Sequence[str | Path] = (), settings: Mapping[str, Any] | None = None, allow_import: Sequence[str] = ()
) -> tuple[Run, str]:
    """The run that these configuration files describe, with further settings on top.

    Args:
        configs: YAML files.
        settings: sections as in YAML.
        allow_import: packages whose classes may be named, beside omniq and Lightning.

    Returns:
        The run, and its resolved settings as YAML.

    Raises:
        UserError: a key or value that is not understood.
    """
    try:
        with allowed_imports(allow_import):
            return run_of(compose(configs, settings))
    except ArgumentError as error:
        raise UserError(" ".join(str(error).split())) from error


def run_of(content: Mapping[str, Any], options: Sequence[str] = ()) -> tuple[Run, str]:
    """The run of these settings with options of the command line on top, and its resolved settings as YAML.

    Raises:
        ArgumentError: an option or key is not understood.
        UserError: a value cannot be used, or a class path is not allowed.
    """
    content, options = apply_stage_options(*without_earlier_settings(content, options))
    if not any(re.match(r"--(print_config|[\w.]+\.help)\b", option) for option in options):
        _check_light_sections(content, options)
    trainer = content.get("trainer")
    # jsonargparse would give another class the defaults of Lightning's Trainer
    no_default = ["trainer"] if isinstance(trainer, str) or "class_path" in (trainer or {}) else []
    parser, config = parse(content, options, _run_class(_heavy_types(), no_default), *_RUN)
    from lightning import Trainer
    from lightning.pytorch.callbacks import Callback

    check_factory("trainer", config.trainer, Trainer)
    for number, callback in enumerate(config.callbacks):
        check_factory(f"callbacks.{number}", callback, Callback)
    text = parser.dump(config, skip_validation=True)
    objects = vars(instantiate(parser, config))
    return Run(**{each.name: objects[each.name] for each in fields(Run)}), text


def _check_light_sections(content: Mapping[str, Any], options: Sequence[str]) -> None:
    """The first pass: prints help, and raises the errors of all sections but the heavy ones."""
    light = {key: "given" if key in HEAVY else value for key, value in content.items()}
    for name in HEAVY:
        if name in content and content[name] is None:
            raise null_error(name)
    remaining: list[str] = []
    skipping = False
    for option in options:
        section = re.match(rf"--({'|'.join(HEAVY)})(?=[.+=]|$)", option)
        if section:
            light[section[1]] = "given"
        elif not skipping or option.startswith("--"):
            remaining.append(option)
        skipping = section is not None and "=" not in option
    parser, config = parse(light, remaining, _run_class(dict.fromkeys(HEAVY, Any), HEAVY), *_RUN)
    objects = vars(instantiate(parser, config))
    Run(**{each.name: objects[each.name] for each in fields(Run)}).check_values()


def _run_class(types: Mapping[str, Any], no_default: Sequence[str]) -> type:
    """``Run`` with these types of the heavy sections, and None in place of the defaults of some."""
    made = []
    for each in fields(Run):
        default = field(default=each.default, default_factory=each.default_factory)
        if each.name in no_default and each.default_factory is not MISSING:
            default = field(default=None)
        made.append((each.name, types.get(each.name, each.type), default))
    return make_dataclass("Run", made, namespace={"__doc__": Run.__doc__})


def _heavy_types() -> dict[str, Any]:
    """The types of the heavy sections; every class that may be named by its last part alone is imported."""
    from lightning import Trainer
    from lightning.pytorch.callbacks import Callback

    from omniq.calibration.stage import Stage

    stages = import_module("omniq.stages")
    for name in stages.__all__:
        getattr(stages, name)
    return {"stages": list[Stage], "trainer": Callable[[], Trainer], "callbacks": list[Callable[[], Callback]]}


def parse(
    content: Mapping[str, Any],
    options: Sequence[str],
    target: Callable[..., Any],
    command: str,
    description: str,
    epilog: str = "",
) -> tuple[ArgumentParser, Namespace]:
    """Parse settings and options as the arguments of a class or function.

    Args:
        content: the settings of all files.
        options: of the command line.
        target: the class or function.
        command: its name.
        description: what the help says first.
        epilog: what the help says last.

    Raises:
        ArgumentError: an option or key is not understood.
        UserError: a setting is null that may not be.
    """
    parser = ArgumentParser(
        prog=f"omniq {command}", description=description, epilog=_EPILOG + epilog, exit_on_error=False
    )
    parser.add_argument("--config", action=ActionConfigFile, help="a YAML file; it may be given several times")
    if isinstance(target, type):
        parser.add_class_arguments(target, as_group=False)
    else:
        parser.add_function_arguments(target, as_group=False)
    check_nulls(content, target)
    try:
        config = parser.parse_args([*(["--config", yaml_text.dump(dict(content))] if content else []), *options])
    except RecursionError as error:
        raise UserError(f"omniq {command}: an option is nested too deeply: give it in a YAML file") from error
    check_nulls(config.as_dict(), target)
    return parser, config


def instantiate(parser: ArgumentParser, config: Namespace) -> Namespace:
    """Make the objects that a parsed configuration describes.

    Raises:
        UserError: one of them refuses its settings.
    """
    try:
        return parser.instantiate(config)
    except (ValueError, TypeError) as error:
        cause: BaseException | None = error
        while cause is not None and not isinstance(cause, UserError):  # of a class that is one choice of several
            cause = cause.__cause__
        raise UserError(str(cause or error)) from error
