# SPDX-License-Identifier: Apache-2.0
"""The ``omniq`` command: quantize, evaluate, export, report.

Plain jsonargparse with LightningCLI's conventions: YAML sections are the arguments of a class or function,
``class_path`` and ``init_args`` where there is a choice, several ``--config`` files compose, ``--section.key value``
overrides, ``--print_config`` shows everything. What the user can mend ends in one line and exit status 2.
"""

import logging
import os
import re
import sys
import warnings
from argparse import ArgumentError
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

import yaml
from jsonargparse import ActionConfigFile, ArgumentParser, Namespace
from transformers.utils import logging as transformers_logging

from omniq.config import Export, Model, Run
from omniq.data import Calibration, Evaluation
from omniq.errors import UserError
from omniq.files import CorruptFile
from omniq.processes import ToldElsewhere


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
            from omniq import pipeline

            pipeline.quantize(*run_of(subparsers[name], config[name]))
        else:
            objects = _instantiate(subparsers[name], config[name])
            COMMANDS[name][0](**{key: value for key, value in vars(objects).items() if key != "config"})
    except ToldElsewhere:
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
    from omniq.evaluate.command import evaluate_checkpoint

    evaluate_checkpoint(model, evaluation, device, batch, out)


def export(run: Path, out: Path, export: Export = Export()) -> None:  # noqa: B008 (frozen)
    """Write another checkpoint of a finished run.

    Args:
        run: its run directory.
        out: folder of the checkpoint.
        export: format and details.
    """
    from omniq.reopen import export_run

    export_run(run, out, export)


def report(run: Path) -> None:
    """Show the losses and perplexities of a run, finished or not.

    Args:
        run: its run directory.
    """
    from omniq.reopen import show_run

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
    subparsers = {name: _subparser(*command) for name, command in COMMANDS.items()}
    for name, subparser in subparsers.items():
        subcommands.add_subcommand(name, subparser, help=COMMANDS[name][1])
    return parser, subparsers


class _ConfigFile(ActionConfigFile):
    """A configuration file on top of earlier settings: a class or a list that it names starts afresh.

    jsonargparse alone would leave another class, and the entries of a list as long as the earlier one, every earlier
    argument of a name that they know.
    """

    def __call__(self, parser: Any, cfg: Any, values: Any, option_string: str | None = None) -> None:
        lists = set(_lists(_content(values)))
        for key in [key for key in cfg.keys(branches=True) if key.replace(".init_args.", ".") in lists]:
            cfg[key] = None  # not popped: the order of the settings stays
        before = cfg.clone()
        super().__call__(parser, cfg, values, option_string)
        classes = {key: path for key, path in before.items() if key.endswith(".class_path")}
        others = [key for key, path in classes.items() if cfg.get(key, path) != path]
        if others:  # short names are resolved only now, so the file is applied again, without the earlier classes
            for key in others:
                if key in before:  # else it was in one of these
                    before[key.removesuffix(".class_path")] = None
            vars(cfg).clear()
            vars(cfg).update(vars(before))
            super().__call__(parser, cfg, values, option_string)


def _content(config: str) -> dict[str, Any]:
    """What a configuration file says, or a text in place of one; its errors name the file, jsonargparse's do not."""
    is_file = config == "-" or os.path.exists(config)
    try:
        content = yaml.safe_load(Path(config).read_text(encoding="utf-8") if is_file else config)
    except OSError as error:
        raise UserError(f"config {config} cannot be read ({error.strerror}): give a YAML file") from error
    except UnicodeDecodeError as error:
        raise UserError(f"config {config} is not UTF-8 text ({error}): save it as UTF-8") from error
    except yaml.YAMLError as error:
        raise UserError(f"config {config} is no valid YAML ({' '.join(str(error).split())}): mend it") from error
    if is_file and not isinstance(content, dict):
        raise UserError(f"config {config} holds no settings: give a YAML file of lines such as `seed: 2`")
    return content if isinstance(content, dict) else {}  # a file that is not there: jsonargparse says so


def _lists(content: Mapping[str, Any], section: str = "") -> Iterator[str]:
    """The dotted keys of all lists, less ``init_args``, which may be left out."""
    for key, value in content.items():
        if isinstance(value, list):
            yield f"{section}{key}"
        elif isinstance(value, dict):
            yield from _lists(value, section if key == "init_args" else f"{section}{key}.")


def _subparser(target: Callable[..., Any], description: str) -> ArgumentParser:
    parser = ArgumentParser(description=description, exit_on_error=False)
    parser.add_argument("--config", action=_ConfigFile, help="a YAML file; of several, later ones win")
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
    parser = _subparser(*COMMANDS["quantize"])
    layers = [str(path) for path in configs] + ([yaml.safe_dump(dict(settings))] if settings else [])
    try:
        config = parser.parse_args([argument for layer in layers for argument in ("--config", layer)])
    except ArgumentError as error:
        raise UserError(" ".join(str(error).split())) from error
    return run_of(parser, config)


def run_of(parser: ArgumentParser, config: Namespace) -> tuple[Run, str]:
    """The run that a parsed configuration describes, and its resolved settings as YAML."""
    settings = parser.dump(config, skip_validation=True)
    objects = vars(_instantiate(parser, config))
    return Run(**{field.name: objects[field.name] for field in fields(Run)}), settings


def _instantiate(parser: ArgumentParser, config: Namespace) -> Namespace:
    try:
        return parser.instantiate(config)
    except (ValueError, TypeError) as error:
        cause: BaseException | None = error
        while cause is not None and not isinstance(cause, UserError):  # of a class that is one choice of several
            cause = cause.__cause__
        raise UserError(str(cause or error)) from error


def quiet() -> None:
    """Keep the chatter of a Trainer for every block out of the terminal; omniq's own warnings stay."""
    chatter = ("pytorch.utilities.rank_zero", "pytorch.accelerators.cuda")
    for name in (*chatter, "fabric.utilities.rank_zero", "fabric.utilities.distributed"):
        logging.getLogger(f"lightning.{name}").setLevel(logging.WARNING)
    log = logging.getLogger("omniq")
    if not log.hasHandlers():  # NOTE: on the root logger, other libraries' warnings would be said in omniq's name
        handler = logging.StreamHandler()
        handler.setFormatter(logging.Formatter("omniq: %(message)s"))
        log.addHandler(handler)
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    transformers_logging.disable_progress_bar()
    warnings.filterwarnings("ignore", ".*does not have many workers.*")
    warnings.filterwarnings("ignore", ".*AccumulateGrad node's stream does not match.*")  # Lightning's DDP
    warnings.filterwarnings("ignore", ".*configure_optimizers` returned `None`.*")  # stages that learn nothing
    warnings.filterwarnings("ignore", ".*treespec, LeafSpec.*")  # Lightning 2.6 with torch 2.13
    warnings.filterwarnings("ignore", ".*Checkpoint directory .* exists and is not empty.*")
