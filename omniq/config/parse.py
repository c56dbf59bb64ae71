# SPDX-License-Identifier: Apache-2.0
"""Parse YAML files and options into a ``Run``, in two passes.

The first pass parses all sections except ``stages``, ``trainer`` and ``callbacks``, whose types take seconds to import.
It prints help and finds most errors. The second pass parses all sections. It runs only if the first pass succeeds.
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
    "Several --config files compose: a later file replaces a list or a class as a whole, and everything else key by "
    "key; options apply after all files. --allow_import PACKAGE allows class paths of that package, in addition to "
    "omniq and lightning."
)
_RUN = (
    "quantize",
    "Quantize a model and write a checkpoint; the same command continues an interrupted run.",
    " --stages.KEY changes the last stage; --stages.NAME.KEY changes the stage of class NAME. --stages.help CLASS, "
    "--callbacks.help CLASS and --trainer.help list the settings of a class.",
)


class Arguments(NamedTuple):
    """A command line, sorted by kind of argument.

    Args:
        configs: the ``--config`` files, in order.
        options: all other arguments, in order.
        packages: the values of ``--allow_import``.
    """

    configs: list[str]
    options: list[str]
    packages: list[str]

    @classmethod
    def sort(cls, args: Iterable[str]) -> "Arguments":
        """Sort the arguments of one command.

        Raises:
            UserError: ``--config`` or ``--allow_import`` has no value.
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
    """Parse configuration files and further settings into a run.

    Args:
        configs: YAML files.
        settings: sections as in YAML. They override the files.
        allow_import: packages whose classes the settings may name, in addition to omniq and Lightning.

    Returns:
        The run, and its resolved settings as YAML.

    Raises:
        UserError: a key or value is not accepted.
    """
    try:
        with allowed_imports(allow_import):
            return run_of(compose(configs, settings))
    except ArgumentError as error:
        raise UserError(" ".join(str(error).split())) from error


def run_of(content: Mapping[str, Any], options: Sequence[str] = ()) -> tuple[Run, str]:
    """Make a run of settings and command-line options; also return its resolved settings as YAML.

    Raises:
        ArgumentError: an option or key is not accepted.
        UserError: a value cannot be used, or a class path is not allowed.
    """
    content, options = apply_stage_options(*without_earlier_settings(_with_one_export(content), options))
    if not any(re.match(r"--(print_config|[\w.]+\.help)\b", option) for option in options):
        _check_light_sections(content, options)
    trainer = content.get("trainer")
    # Otherwise jsonargparse applies the defaults of Lightning's Trainer to another class.
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


def _with_one_export(content: Mapping[str, Any]) -> dict[str, Any]:
    """Translate a list of checkpoints under ``export`` to the first checkpoint with ``also``.

    Raises:
        UserError: the list is empty, or an entry is not a mapping.
    """
    export = content.get("export")
    if not isinstance(export, list):
        return {**content}
    if not export or not all(isinstance(entry, Mapping) for entry in export):
        raise UserError(f"export: {export} is not a list of checkpoints: give entries such as {{format: gptq}}")
    return {**content, "export": {**export[0], "also": export[1:]}}


def _check_light_sections(content: Mapping[str, Any], options: Sequence[str]) -> None:
    """Run the first pass: print help, and raise the errors of all sections except the heavy ones."""
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
    """Make ``Run`` with these types for the heavy sections, and with None as the default of the named ones."""
    made = []
    for each in fields(Run):
        default = field(default=each.default, default_factory=each.default_factory)
        if each.name in no_default and each.default_factory is not MISSING:
            default = field(default=None)
        made.append((each.name, types.get(each.name, each.type), default))
    return make_dataclass("Run", made, namespace={"__doc__": Run.__doc__})


def _heavy_types() -> dict[str, Any]:
    """Return the types of the heavy sections. Import all stages, so that a class name alone is a valid class path."""
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
        content: the merged settings of all files.
        options: the command-line options.
        target: the class or function.
        command: name of the command.
        description: first paragraph of the help.
        epilog: last paragraph of the help.

    Raises:
        ArgumentError: an option or key is not accepted.
        UserError: a setting that needs a value is null.
    """
    parser = ArgumentParser(
        prog=f"omniq {command}", description=description, epilog=_EPILOG + epilog, exit_on_error=False
    )
    parser.add_argument("--config", action=ActionConfigFile, help="a YAML file; the option may be repeated")
    if isinstance(target, type):
        parser.add_class_arguments(target, as_group=False)
    else:
        parser.add_function_arguments(target, as_group=False)
    check_nulls(content, target)
    try:
        config = parser.parse_args([*(["--config", yaml_text.dump(dict(content))] if content else []), *options])
    except RecursionError as error:
        raise UserError(f"omniq {command}: an option is nested too deeply: set it in a YAML file") from error
    check_nulls(config.as_dict(), target)
    return parser, config


def instantiate(parser: ArgumentParser, config: Namespace) -> Namespace:
    """Construct the objects that a parsed configuration describes.

    Raises:
        UserError: an object refuses its settings.
    """
    try:
        return parser.instantiate(config)
    except (ValueError, TypeError) as error:
        cause: BaseException | None = error
        while cause is not None and not isinstance(cause, UserError):  # wrapped if several classes are possible
            cause = cause.__cause__
        raise UserError(str(cause or error)) from error
