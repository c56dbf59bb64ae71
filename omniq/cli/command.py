# SPDX-License-Identifier: Apache-2.0
"""The ``omniq`` command: quantize, evaluate, export, report.

Plain jsonargparse with LightningCLI's conventions: YAML sections are the arguments of a class or function,
``class_path`` and ``init_args`` where there is a choice, several ``--config`` files compose, ``--section.key value``
overrides, ``--print_config`` shows everything. What the user can mend ends in one line and exit status 2.
"""

import re
import sys
from argparse import ArgumentError
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from jsonargparse import ArgumentParser

from omniq.cli.quiet import quiet
from omniq.config.parse import command_parser, instantiate, run_of
from omniq.config.run import Export, Model, Run
from omniq.data import Calibration, Evaluation
from omniq.distributed.collectives import ErrorOnRank0
from omniq.errors import CorruptFile, UserError


def main(args: Sequence[str] | None = None) -> int:
    """Run a command line.

    Args:
        args: without the program's name; ``sys.argv[1:]`` if None.

    Returns:
        The exit status: 0, 2 for what the user can mend, 130 for an interruption from the keyboard.
    """
    quiet()
    name = None
    try:
        parser, subparsers = build_parser()
        config = parser.parse_args(list(sys.argv[1:] if args is None else args))
        name = config.subcommand
        if name == "quantize":
            from omniq.run import loop

            loop.quantize(*run_of(subparsers[name], config[name]))
        else:
            objects = instantiate(subparsers[name], config[name])
            COMMANDS[name][0](**{key: value for key, value in vars(objects).items() if key != "config"})
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
    except KeyboardInterrupt:
        print(f"omniq: interrupted{CONTINUES if name == 'quantize' else ''}", file=sys.stderr)
        return 130
    return 0


def _understood(error: ArgumentError) -> str:
    """What the parser refuses, in one line, and where its choices are listed: settings of a class by its own help."""
    text = " ".join(str(error).split())
    owner = re.match(r"Parser key \"([\w.]+)\": Problem with given class_path '([\w.]+)'", text)
    options = f"--{owner[1]}.help {owner[2]}" if owner else "--help"
    return f"{text}; `omniq COMMAND {options}` lists what there is"


def evaluate(
    model: Model,
    evaluation: Evaluation,
    device: str = "auto",
    batch: int = 4,
    out: Path | None = None,
    data: Calibration | None = None,
) -> None:
    """Measure the perplexity of a model that omniq or transformers can load.

    Args:
        model: one of a family that omniq knows is streamed block by block; any other, and one that is quantized
            already, is run by transformers.
        evaluation: the text.
        device: ``cpu``, ``cuda``, or ``auto`` for a GPU where there is one.
        batch: windows at once.
        out: a JSON file for the result.
        data: not used; here so that the files of ``configs/data`` serve this command too.
    """
    from omniq.cli.evaluate import evaluate_checkpoint

    evaluate_checkpoint(model, evaluation, device, batch, out)


def export(run: Path, out: Path, export: Export = Export()) -> None:  # noqa: B008 (frozen)
    """Write another checkpoint of a finished run.

    Args:
        run: its run directory.
        out: folder of the checkpoint.
        export: format and details.
    """
    from omniq.run.saved import export_run

    export_run(run, out, export)


def report(run: Path) -> None:
    """Show the losses and perplexities of a run, finished or not.

    Args:
        run: its run directory.
    """
    from omniq.cli.report import show_run

    show_run(run)


CONTINUES = "; the same command continues this run"

COMMANDS: dict[str, tuple[Callable[..., Any], str]] = {
    "quantize": (Run, "quantize a model and write a checkpoint; the same command continues an interrupted run"),
    "evaluate": (evaluate, "measure the perplexity of a model"),
    "export": (export, "write another checkpoint of a finished run"),
    "report": (report, "show the losses and perplexities of a run"),
}


def build_parser() -> tuple[ArgumentParser, dict[str, ArgumentParser]]:
    """The parser of the whole command line, and that of each subcommand."""
    parser = ArgumentParser(prog="omniq", description="Quantize language models block by block.", exit_on_error=False)
    subcommands = parser.add_subcommands(required=True)
    subparsers = {name: command_parser(*command) for name, command in COMMANDS.items()}
    for name, subparser in subparsers.items():
        subcommands.add_subcommand(name, subparser, help=COMMANDS[name][1])
    return parser, subparsers
