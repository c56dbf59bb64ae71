# SPDX-License-Identifier: Apache-2.0
"""The ``omniq`` command: quantize, evaluate, export, report.

Plain jsonargparse with LightningCLI's conventions: YAML sections are the arguments of a class or function,
``class_path`` and ``init_args`` where there is a choice, several ``--config`` files compose, ``--section.key value``
overrides, ``--print_config`` shows everything. An error that the user can fix is printed in one line, with exit status
2. Help and most of these errors come before torch is imported.
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

from omniq.cli.interrupt import Interrupted, interruptible
from omniq.cli.quiet import quiet, quiet_transformers
from omniq.config.class_paths import allowed_imports
from omniq.config.compose import compose
from omniq.config.parse import Arguments, instantiate, parse, run_of
from omniq.config.run import EvaluatedModel, Export, MovedModel, Run
from omniq.data import Evaluation
from omniq.errors import CorruptFile, ErrorOnRank0, UserError
from omniq.report.streams import replace_unencodable


def main(args: Sequence[str] | None = None) -> int:
    """Run a command line.

    Args:
        args: without the program's name; ``sys.argv[1:]`` if None.

    Returns:
        The exit status: 0, 2 for an error that the user can fix, 130 for an interruption from the keyboard.
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
        print(f"omniq: {_understood(error)}", file=sys.stderr)
        return 2
    except UserError as error:
        print(f"omniq: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    except CorruptFile as error:
        print(f"omniq: {error}; run the quantize command again, which computes it anew", file=sys.stderr)
        return 2
    except (Interrupted, KeyboardInterrupt):
        print(f"omniq: interrupted{CONTINUES if name == 'quantize' else ''}", file=sys.stderr)
        return 130
    return 0


def _understood(error: ArgumentError) -> str:
    """What the parser refuses, in one line, and the option that lists what it accepts."""
    text = " ".join(str(error).split())
    denied = re.search(r"Importing '(([\w]+)[\w.]*)' is not allowed", text)
    if denied:
        return (
            f"class path {denied[1]} is outside the packages that a configuration may name (omniq, lightning): if you "
            f"trust that package and this configuration, add --allow_import {denied[2]}"
        )
    owner = re.match(r"Parser key \"([\w.]+)\": Problem with given class_path '([\w.]+)'", text)
    options = f"--{owner[1]}.help {owner[2]}" if owner else "--help"
    return f"{text}; `omniq COMMAND {options}` lists what there is"


def quantize(arguments: Arguments) -> None:
    """Quantize a model and write a checkpoint; the same command continues an interrupted run."""
    run, settings = run_of(compose(arguments.configs), arguments.options)
    quiet_transformers()
    from omniq.run import loop

    loop.quantize(run, settings)


def evaluate(
    model: EvaluatedModel, evaluation: Evaluation, device: str = "auto", batch: int = 4, out: Path | None = None
) -> None:
    """Measure the perplexity of a model that omniq or transformers can load.

    Of a configuration file for ``omniq quantize`` it reads the sections ``model`` and ``evaluation`` only.

    Args:
        model: one of a family that omniq knows is streamed block by block; any other, and one that is quantized
            already, is run by transformers.
        evaluation: the text.
        device: ``cpu``, ``cuda``, or ``auto`` for a GPU where there is one.
        batch: windows at once.
        out: a JSON file for the result.
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
        run: its run directory.
        out: folder of the checkpoint.
        export: format and details.
        model: where the model of the run is now; its content must be the same.
    """
    quiet_transformers()
    from omniq.run.saved import export_run

    export_run(run, out, export, model.path)


def report(run: Path) -> None:
    """Show the losses and perplexities of a run, finished or not.

    Args:
        run: its run directory.
    """
    from omniq.cli.report import show_run

    show_run(run)


CONTINUES = "; the same command continues this run"


def _call(target: Callable[..., None]) -> Callable[[Arguments], None]:
    """A command that parses its arguments and calls a function with them."""

    def command(arguments: Arguments) -> None:
        target(**arguments_of(target, arguments))

    return command


def arguments_of(target: Callable[..., None], arguments: Arguments) -> dict[str, Any]:
    """The arguments of a function, from files and options."""
    content, names = compose(arguments.configs), signature(target).parameters
    if content.keys() & ({field.name for field in fields(Run)} - names.keys()):  # a file for quantize
        content = {key: content[key] for key in ("model", "evaluation") if key in content and key in names}
    parser, config = parse(content, arguments.options, target, target.__name__, str(target.__doc__).partition("\n")[0])
    return {key: value for key, value in vars(instantiate(parser, config)).items() if key in names}


COMMANDS: dict[str, tuple[Callable[[Arguments], None], str]] = {
    "quantize": (quantize, "quantize a model and write a checkpoint; the same command continues an interrupted run"),
    "evaluate": (_call(evaluate), "measure the perplexity of a model"),
    "export": (_call(export), "write another checkpoint of a finished run"),
    "report": (_call(report), "show the losses and perplexities of a run"),
}


def _commands() -> ArgumentParser:
    """A parser of the name of the command, for ``omniq --help`` and for names that are not commands."""
    parser = ArgumentParser(prog="omniq", description="Quantize language models block by block.", exit_on_error=False)
    subcommands = parser.add_subcommands(required=True)
    for name, (_, summary) in COMMANDS.items():
        subcommands.add_subcommand(name, ArgumentParser(exit_on_error=False), help=summary)
    return parser
