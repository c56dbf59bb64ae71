# SPDX-License-Identifier: Apache-2.0
"""The ``omniq`` command: quantize, tune, inspect, evaluate, export, verify, report.

The parser is plain jsonargparse with the conventions of LightningCLI: YAML sections hold the arguments of a class or
function, ``class_path`` and ``init_args`` select a class, several ``--config`` files compose, ``--section.key value``
overrides a setting, and ``--print_config`` prints the resolved configuration. The command prints an error that the user
can fix in one line and exits with status 2. It prints help and most of these errors before it imports torch.
"""

import re
import sys
from argparse import ArgumentError
from collections.abc import Callable, Sequence
from dataclasses import fields
from inspect import signature
from pathlib import Path
from typing import Any

from jsonargparse import ArgumentParser

from omniq import stages
from omniq.cli.interrupt import Interrupted, interruptible
from omniq.cli.quiet import quiet, quiet_transformers
from omniq.config.class_paths import allowed_imports
from omniq.config.compose import compose
from omniq.config.parse import Arguments, instantiate, parse, resolve
from omniq.config.run import EvaluatedModel, Export, Model, MovedModel, Run
from omniq.data import Evaluation, TextSource
from omniq.errors import CorruptFile, ErrorOnRank0, UserError
from omniq.report.streams import replace_unencodable


def main(args: Sequence[str] | None = None) -> int:
    """Run a command line.

    Args:
        args: the arguments after the program's name. The default is ``sys.argv[1:]``.

    Returns:
        The exit status: 0 for success, 2 for an error that the user can fix, 130 after Ctrl-C.
    """
    quiet()
    replace_unencodable()
    args = list(sys.argv[1:] if args is None else args)
    name = args[0] if args else None
    try:
        if name not in COMMANDS:
            name = _commands().parse_args(args).subcommand
        arguments = Arguments.sort(args[1:])
        with interruptible(), allowed_imports(arguments.packages):
            COMMANDS[name][0](arguments)
    except ErrorOnRank0:
        return 2
    except ArgumentError as error:
        print(f"omniq: {_parser_message(error)}", file=sys.stderr)
        return 2
    except UserError as error:
        print(f"omniq: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    except CorruptFile as error:
        print(f"omniq: {error}; run the quantize command again to compute it again", file=sys.stderr)
        return 2
    except (Interrupted, KeyboardInterrupt):
        print(f"omniq: interrupted{CONTINUES if name in ('quantize', 'tune') else ''}", file=sys.stderr)
        return 130
    return 0


def _parser_message(error: ArgumentError) -> str:
    """Return the message of a parser error in one line, with the remedy."""
    text = " ".join(str(error).split())
    choice = re.fullmatch(r"Parser key \"([\w.]+)\": Expected a typing\.Literal\[(.*)\]\. Got value: (.*)", text)
    if choice:
        return f"{choice[1]} {choice[3]!r} is not accepted: give one of {choice[2]}"
    denied = re.search(r"Importing '(([\w]+)[\w.]*)' is not allowed", text)
    if denied:
        return (
            f"class path {denied[1]} is outside the packages that a configuration may name (omniq, lightning): if you "
            f"trust that package and this configuration, add --allow_import {denied[2]}"
        )
    unknown = re.fullmatch(r"(?:Parser key \"(stages)\"|--([\w.]+)\.help): (?:Expected a|module) .* '?([\w.]+)'?", text)
    if unknown:
        setting = unknown[1] or unknown[2]
        sources = setting in ("data.source", "evaluation.source")
        known = [each.__name__ for each in TextSource.__subclasses__()] if sources else stages.__all__
        names = f"one of {', '.join(known)}, or " if sources or setting == "stages" else ""
        return f"{setting}: no class is named {unknown[3]}: give {names}a class path such as my_package.MyClass"
    owner = re.match(r"Parser key \"([\w.]+)\": Problem with given class_path '([\w.]+)'", text)
    options = f"--{owner[1]}.help {owner[2]}" if owner else "--help"
    return f"{text}; `omniq COMMAND {options}` lists what is accepted"


def quantize(arguments: Arguments) -> None:
    """Quantize a model and write a checkpoint; the same command continues an interrupted run."""
    run, settings = resolve(arguments.configs, {}, arguments.options, arguments.preset)
    quiet_transformers()
    from omniq.run import loop

    loop.quantize(run, settings)


def tune(arguments: Arguments) -> None:
    """Improve finished blocks end to end and write a checkpoint; the same command continues an interrupted run."""
    from omniq.cli.tune import run_to_tune

    run, settings = run_to_tune(arguments)
    quiet_transformers()
    from omniq.run import loop

    loop.quantize(run, settings)


def evaluate(
    model: EvaluatedModel, evaluation: Evaluation, device: str = "auto", batch: int = 4, out: Path | None = None
) -> None:
    """Measure the perplexity of a model.

    omniq streams a full-precision model of a known family block by block; transformers runs any other model. From a
    configuration file for ``omniq quantize``, only the sections ``model`` and ``evaluation`` are used.

    Args:
        model: the model to evaluate.
        evaluation: the text to evaluate on.
        device: ``cpu``, ``cuda``, or ``auto``, which selects a GPU if one is present.
        batch: number of sequences per forward pass.
        out: path of a JSON file for the result. No file is written by default.
    """
    quiet_transformers()
    from omniq.cli.evaluate import evaluate_checkpoint

    evaluate_checkpoint(model, evaluation, device, batch, out)


def export(
    run: Path,
    out: Path,
    export: Export = Export(),  # noqa: B008 (frozen)
    model: MovedModel = MovedModel(),  # noqa: B008 (frozen)
) -> None:
    """Write another checkpoint of a finished run.

    Args:
        run: the run directory.
        out: the folder to write the checkpoint to.
        export: format and other settings of the checkpoint.
        model: the model of the run, if it was moved. Its content must be unchanged.
    """
    quiet_transformers()
    from omniq.run.saved import export_run

    export_run(run, out, export, model.path)


def report(run: Path) -> None:
    """Show the losses and perplexities of a finished or unfinished run.

    Args:
        run: the run directory.
    """
    from omniq.cli.report import show_run

    show_run(run)


def inspect(model: Model, json: bool = False) -> None:
    """Show what omniq finds in a model: blocks, linears, equivalences, group sizes, formats. No file is written.

    Args:
        model: the model.
        json: print JSON instead of tables.
    """
    quiet_transformers()
    from omniq.cli.inspect import inspect_model

    inspect_model(model, json)


def verify(model: Path, run: Path | None = None, runtime: str | None = None, source: str | None = None) -> None:
    """Check an exported model: every code, and its logits in each installed runtime.

    Args:
        model: the folder of the export.
        run: the run directory from which it was written. By default the weight files are compared with the digests
            that omniq recorded in the folder.
        runtime: the only runtime to compare: ``transformers``, ``llama.cpp``, ``openvino`` or ``mlx``. By default every
            installed runtime that opens the format.
        source: where the model of the run is now. Its content must be the same.
    """
    quiet_transformers()
    from omniq.report.console import plain_console
    from omniq.run.verified import verify_export

    verify_export(model, run, runtime, source, plain_console())


CONTINUES = "; the same command continues this run"


def _call(target: Callable[..., None]) -> Callable[[Arguments], None]:
    """Make a command that parses its arguments and calls a function with them."""

    switches = {f"--{name}" for name, each in signature(target).parameters.items() if each.annotation is bool}

    def command(arguments: Arguments) -> None:
        options = [f"{option}=true" if option in switches else option for option in arguments.options]
        target(**arguments_of(target, arguments._replace(options=options)))

    return command


def arguments_of(target: Callable[..., None], arguments: Arguments) -> dict[str, Any]:
    """Parse files and options into the arguments of a function.

    Raises:
        UserError: a setting is not accepted, or a preset is given.
    """
    if arguments.preset is not None:
        raise UserError(f"--preset {arguments.preset}: omniq {target.__name__} has no presets; remove the option")
    content, names = compose(arguments.configs), signature(target).parameters
    if content.keys() & ({field.name for field in fields(Run)} - names.keys()):  # a file for quantize
        content = {key: content[key] for key in ("model", "evaluation") if key in content and key in names}
    description = " ".join(str(target.__doc__).partition("Args:")[0].split())
    parser, config = parse(content, arguments.options, target, target.__name__, description)
    return {key: value for key, value in vars(instantiate(parser, config)).items() if key in names}


COMMANDS: dict[str, tuple[Callable[[Arguments], None], str]] = {
    "quantize": (quantize, "quantize a model and write a checkpoint; the same command continues an interrupted run"),
    "inspect": (_call(inspect), "show what omniq finds in a model: blocks, linears, equivalences, formats"),
    "tune": (tune, "improve the scales and norms of a finished run, or of a quantized checkpoint, end to end"),
    "evaluate": (_call(evaluate), "measure the perplexity of a model"),
    "export": (_call(export), "write another checkpoint of a finished run"),
    "verify": (_call(verify), "check an exported model: every code, and its logits in each installed runtime"),
    "report": (_call(report), "show the losses and perplexities of a run"),
}


def _commands() -> ArgumentParser:
    """Make the parser of the command's name. It prints ``omniq --help`` and refuses unknown commands."""
    parser = ArgumentParser(prog="omniq", description="Quantize language models block by block.", exit_on_error=False)
    subcommands = parser.add_subcommands(required=True)
    for name, (_, summary) in COMMANDS.items():
        subcommands.add_subcommand(name, ArgumentParser(exit_on_error=False), help=summary)
    return parser
