# SPDX-License-Identifier: Apache-2.0
"""Parse YAML files and options into a ``Run``, in two passes.

The first pass parses all sections except ``trainer`` and ``callbacks``, whose types take seconds to import. It prints
help, finds most errors and constructs the objects. The second pass parses all sections, if the first pass succeeds.
"""

import logging
import re
from argparse import ArgumentError
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import MISSING, field, fields, make_dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

from jsonargparse import ActionConfigFile, ArgumentParser, Namespace

from omniq import stages
from omniq.config import yaml_text
from omniq.config.class_paths import allowed_imports, check_factory
from omniq.config.compose import compose
from omniq.config.earlier import without_earlier_settings
from omniq.config.nulls import check_nulls, null_error
from omniq.config.presets import (
    DEFAULT_BITS,
    DEFAULT_PRESET,
    GROUP_SIZES,
    compose_preset,
    fitting_scheme,
    is_first_process,
    preset_of,
    scheme_given,
)
from omniq.config.run import Run
from omniq.config.stage_options import apply_stage_options
from omniq.errors import UserError

HEAVY = ("trainer", "callbacks")
"""Sections whose types import torch and Lightning."""

_EPILOG = (
    "Several --config files compose: a later file replaces a list or a class as a whole, and everything else key by "
    "key; options apply after all files. --allow_import PACKAGE allows class paths of that package, in addition to "
    "omniq and lightning."
)
_RUN = (
    "quantize",
    "Quantize a model and write a checkpoint; the same command continues an interrupted run.",
    " --preset fast, --preset balanced or --preset best chooses the stages for the scheme; without stages, balanced is "
    "the default. --stages.KEY changes the last stage; --stages.NAME.KEY changes the stage of class NAME. "
    "--stages.help CLASS, --callbacks.help CLASS and --trainer.help list the settings of a class.",
)

log = logging.getLogger("omniq")


class Arguments(NamedTuple):
    """A command line, sorted by kind of argument.

    Args:
        configs: the ``--config`` files, in order.
        options: all other arguments, in order.
        packages: the values of ``--allow_import``.
        presets: the values of ``--preset``.
    """

    configs: list[str]
    options: list[str]
    packages: list[str]
    presets: list[str]

    @property
    def preset(self) -> str | None:
        """The preset; the last value counts."""
        return self.presets[-1] if self.presets else None

    @classmethod
    def sort(cls, args: Iterable[str]) -> "Arguments":
        """Sort the arguments of one command.

        Raises:
            UserError: ``--config``, ``--allow_import`` or ``--preset`` has no value.
        """
        found, left = cls([], [], [], []), iter(args)
        groups = {"--config": found.configs, "--allow_import": found.packages, "--preset": found.presets}
        examples = {"--config": "mine.yaml", "--allow_import": "my_package", "--preset": DEFAULT_PRESET}
        for argument in left:
            name, given, value = argument.partition("=")
            group = groups.get(name)
            if group is None:
                found.options.append(argument)
                continue
            if not given and (value := next(left, "")) == "":
                raise UserError(f"{name} has no value: give one, such as {name} {examples[name]}")
            group.append(value)
        return found


def parse_run(
    configs: Sequence[str | Path] = (),
    settings: Mapping[str, Any] | None = None,
    allow_import: Sequence[str] = (),
    preset: str | None = None,
) -> tuple[Run, str]:
    """Parse configuration files and further settings into a run.

    Args:
        configs: YAML files.
        settings: sections as in YAML. They override the files.
        allow_import: packages whose classes the settings may name, in addition to omniq and Lightning.
        preset: name of a preset, on which the files and settings build.

    Returns:
        The run, and its resolved settings as YAML.

    Raises:
        UserError: a key or value is not accepted.
    """
    try:
        with allowed_imports(allow_import):
            return resolve(configs, settings or {}, (), preset)
    except ArgumentError as error:
        raise UserError(" ".join(str(error).split())) from error


def resolve(
    configs: Sequence[str | Path], settings: Mapping[str, Any], options: Sequence[str], preset: str | None
) -> tuple[Run, str]:
    """Make a run of files, settings, options and a preset (``omniq.config.presets``); also return its settings as YAML.

    A preset without a scheme opens the model to find the group size.

    Raises:
        ArgumentError: an option or key is not accepted.
        UserError: a value cannot be used, a class path is not allowed, or the model cannot be opened.
    """
    content = compose(configs, settings)
    name = preset_of(content, options, preset)
    if name is None:
        return run_of(content, options)
    given = scheme_given(content, options)
    scheme = given or f"{DEFAULT_BITS}g{GROUP_SIZES[0]}"
    run, text = run_of(compose_preset(name, scheme, configs, settings, options), options)
    if given is None and (fitting := fitting_scheme(run.model)) != scheme:
        scheme = fitting
        run, text = run_of(compose_preset(name, scheme, configs, settings, options), options)
    if is_first_process():
        stages = ", ".join(type(stage).__name__ for stage in run.stages)
        log.warning("preset %s: %s by %s", name, scheme, stages)
    return run, text


def run_of(
    content: Mapping[str, Any], options: Sequence[str] = (), about: tuple[str, str, str] = _RUN
) -> tuple[Run, str]:
    """Make a run of settings and command-line options; also return its resolved settings as YAML.

    Args:
        content: the merged settings of all files.
        options: the command-line options.
        about: name of the command, and the first and the last paragraph of its help.

    Raises:
        ArgumentError: an option or key is not accepted.
        UserError: a value cannot be used, or a class path is not allowed.
    """
    for name in stages.__all__:  # import all stages, so that a class name alone is a valid class path
        getattr(stages, name)
    content, options = apply_stage_options(*without_earlier_settings(_with_one_export(content), options))
    prints = any(re.match(rf"--(print_config|({'|'.join(HEAVY)})[\w.]*\.help)\b", option) for option in options)
    run = None if prints else _light_run(content, options, about)
    trainer = content.get("trainer")
    # Otherwise jsonargparse applies the defaults of Lightning's Trainer to another class.
    no_default = ["trainer"] if isinstance(trainer, str) or "class_path" in (trainer or {}) else []
    parser, config = parse(content, options, _run_class(_heavy_types(), no_default), *about)
    from lightning import Trainer
    from lightning.pytorch.callbacks import Callback

    check_factory("trainer", config.trainer, Trainer)
    for number, callback in enumerate(config.callbacks):
        check_factory(f"callbacks.{number}", callback, Callback)
    text = parser.dump(config, skip_validation=True)
    assert run is not None  # otherwise the parser has printed and exited
    config.stages = []  # the first pass has constructed them; a stage may log a warning
    objects = instantiate(parser, config)
    return replace(run, **{name: objects[name] for name in HEAVY}), text


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


def _light_run(content: Mapping[str, Any], options: Sequence[str], about: tuple[str, str, str]) -> Run:
    """Run the first pass: print help, and construct a run without its heavy sections.

    Raises:
        ArgumentError: an option or key is not accepted.
        UserError: a value cannot be used.
    """
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
    parser, config = parse(light, remaining, _run_class(dict.fromkeys(HEAVY, Any), HEAVY), *about)
    objects = vars(instantiate(parser, config))
    run = Run(**{each.name: objects[each.name] for each in fields(Run)})
    run.check()
    return run


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
    """Return the types of the heavy sections."""
    from lightning import Trainer
    from lightning.pytorch.callbacks import Callback

    return {"trainer": Callable[[], Trainer], "callbacks": list[Callable[[], Callback]]}


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
