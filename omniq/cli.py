# SPDX-License-Identifier: Apache-2.0
"""The ``omniq`` command: quantize, evaluate, export, report.

Plain jsonargparse with LightningCLI's conventions: YAML sections are the arguments of a function, ``class_path`` and
``init_args`` where there is a choice, several ``--config`` files compose, ``--section.key value`` overrides,
``--print_config`` shows everything. What the user can mend ends in one line and exit status 2.
"""

import logging
import os
import sys
import warnings
from argparse import ArgumentError
from collections.abc import Callable, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

from jsonargparse import ArgumentParser, Namespace

from omniq.config import Model, Run
from omniq.data import Evaluation
from omniq.errors import UserError


def main(args: Sequence[str] | None = None) -> int:
    """Run a command line.

    Args:
        args: without the program's name; ``sys.argv[1:]`` if None.

    Returns:
        The exit status: 0, or 2 for what the user can mend.
    """
    quiet()
    try:
        parser, commands = build_parser()
        config = parser.parse_args(list(sys.argv[1:] if args is None else args))
        name = config.subcommand
        return commands[name](config[name]) or 0
    except (UserError, ArgumentError) as error:
        print(f"omniq: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("omniq: interrupted; the same command continues this run", file=sys.stderr)
        return 130


def build_parser() -> tuple[ArgumentParser, dict[str, Callable[[Namespace], int | None]]]:
    """The parser with its subcommands, and what each of them does with its part of the configuration."""
    parser = ArgumentParser(prog="omniq", description="Quantize language models block by block.", exit_on_error=False)
    subcommands = parser.add_subcommands(required=True)
    commands: dict[str, Callable[[Namespace], int | None]] = {}
    for name, (function, help_text) in COMMANDS.items():
        sub = ArgumentParser(description=help_text, exit_on_error=False)
        sub.add_argument("--config", action="config", help="a YAML file; may be given several times, later ones win")
        if name == "quantize":
            sub.add_class_arguments(Run, as_group=False)
        else:
            sub.add_function_arguments(function, as_group=False)
        subcommands.add_subcommand(name, sub, help=help_text)
        commands[name] = _command(name, sub, function)
    return parser, commands


def _command(name: str, parser: ArgumentParser, function: Callable[..., Any]) -> Callable[[Namespace], int | None]:
    def run(config: Namespace) -> int | None:
        settings = parser.dump(config, skip_validation=True)
        try:
            objects = parser.instantiate_classes(config)
        except (ValueError, TypeError) as error:
            raise UserError(str(error)) from error
        arguments = {key: value for key, value in vars(objects).items() if key != "config"}
        if name == "quantize":
            run_fields = {field.name for field in fields(Run)}
            quantize(Run(**{key: value for key, value in arguments.items() if key in run_fields}), settings)
            return 0
        result: int | None = function(**arguments)
        return result

    return run


def quantize(run: Run, settings: str) -> None:
    """Quantize a model and write a checkpoint; the same command continues an interrupted run."""
    from omniq import pipeline

    pipeline.quantize(run, settings)


def evaluate(
    model: Model, evaluation: Evaluation, device: str = "auto", batch: int = 4, out: Path | None = None
) -> None:
    """Measure the perplexity of a model that omniq or transformers can load.

    Args:
        model: a full-precision model (streamed block by block) or a quantized checkpoint (loaded by transformers).
        evaluation: the text.
        device: ``cpu``, ``cuda``, or ``auto`` for a GPU where there is one.
        batch: windows at once.
        out: a JSON file for the result.
    """
    from omniq.evaluate.command import evaluate_checkpoint

    evaluate_checkpoint(model, evaluation, device, batch, out)


def export(run: Path, out: Path, format: str = "compressed-tensors", max_shard_size: float = 5.0, verify: bool = True) -> None:
    """Write a checkpoint of a finished run.

    Args:
        run: its run directory.
        out: folder of the checkpoint.
        format: how codes are packed.
        max_shard_size: gigabytes of one safetensors file.
        verify: reopen the checkpoint, compare every code, and compare logits through transformers.
    """
    from omniq.reopen import export_run

    export_run(run, out, format, max_shard_size, verify)


def report(run: Path) -> None:
    """Show the losses and perplexities of a run, finished or not.

    Args:
        run: its run directory.
    """
    from omniq.report import show

    show(run)


COMMANDS: dict[str, tuple[Callable[..., Any], str]] = {
    "quantize": (quantize, "quantize a model and write a checkpoint; the same command continues an interrupted run"),
    "evaluate": (evaluate, "measure the perplexity of a model"),
    "export": (export, "write a checkpoint of a finished run"),
    "report": (report, "show the losses and perplexities of a run"),
}


def parse(args: Sequence[str]) -> tuple[Run, str]:
    """The run that ``omniq quantize`` with these arguments would start, and its resolved settings as YAML."""
    parser, _ = build_parser()
    config = parser.parse_args(["quantize", *args]).quantize
    sub = parser._subcommands_action._name_parser_map["quantize"]
    objects = sub.instantiate_classes(config)
    names = {field.name for field in fields(Run)}
    return Run(**{key: value for key, value in vars(objects).items() if key in names}), sub.dump(config)


def quiet() -> None:
    """Keep the chatter of a Trainer for every block out of the terminal; omniq's own warnings stay."""
    for name in ("lightning.pytorch.utilities.rank_zero", "lightning.fabric.utilities.rank_zero"):
        logging.getLogger(name).setLevel(logging.WARNING)
    logging.basicConfig(format="omniq: %(message)s", level=logging.WARNING)
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    warnings.filterwarnings("ignore", ".*does not have many workers.*")
    warnings.filterwarnings("ignore", ".*Checkpoint directory .* exists and is not empty.*")
