# SPDX-License-Identifier: Apache-2.0
"""``omniq tune``: a run whose blocks come from a finished run or a checkpoint, with ``EndToEnd`` as its last stage.

The command writes the list of stages and, for a checkpoint, the scheme. All other settings are those of the finished
run, then those of the given files and options, as for ``omniq quantize``.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from omniq.config.compose import compose, merge, read
from omniq.config.parse import Arguments, run_of
from omniq.config.run import Run
from omniq.config.saved import check_run_directory
from omniq.errors import UserError
from omniq.storage.atomic import expand_home

_ABOUT = (
    "tune",
    "Improve the scales, norms and biases of finished blocks end to end (omniq.stages.EndToEnd), and write a "
    "checkpoint. Codes stay. --run RUN names a finished run of omniq; its settings are the defaults. --checkpoint "
    "FOLDER names a quantized model of any program, in a format that omniq reads; --model.path then names the model "
    "that it was made from. The same command continues an interrupted run.",
    " --stages.KEY changes a setting of EndToEnd, such as --stages.epochs 8.",
)


def run_to_tune(arguments: Arguments) -> tuple[Run, str]:
    """Make the run that the arguments of ``omniq tune`` describe; also return its resolved settings as YAML.

    Raises:
        ArgumentError: an option or key is not accepted.
        UserError: neither or both of ``--run`` and ``--checkpoint`` are given, or a value cannot be used.
    """
    given, options = _take(arguments.options, ("--run", "--checkpoint"))
    if any(option in ("-h", "--help") for option in options):
        return run_of({}, options, _ABOUT)
    if len(given) != 1:
        raise UserError("omniq tune: give either --run RUN, a finished run, or --checkpoint FOLDER, a quantized model")
    ((name, value),) = given.items()
    path = expand_home(value)
    start = _settings_of_run(path) if name == "--run" else _settings_of_checkpoint(path)
    stages = [{"class_path": "omniq.stages.FromCheckpoint", "init_args": {"path": str(path)}}, "omniq.stages.EndToEnd"]
    content = merge({**start, "stages": stages}, compose(arguments.configs))
    if "out" not in content and not any(option.partition("=")[0] == "--out" for option in options):
        raise UserError("omniq tune: --out is missing: give a new run directory, such as --out checkpoints/tuned")
    return run_of(content, options, _ABOUT)


def _take(options: Sequence[str], names: Sequence[str]) -> tuple[dict[str, str], list[str]]:
    """Remove options from a command line; return their values, and the remaining options."""
    found: dict[str, str] = {}
    others, left = [], iter(options)
    for option in left:
        name, given, value = option.partition("=")
        if name not in names:
            others.append(option)
            continue
        found[name] = value if given else next(left, "")
        if not found[name]:
            raise UserError(f"{name} has no value: give a folder")
    return found, others


def _settings_of_run(path: Path) -> Mapping[str, Any]:
    """Return the settings of a finished run, without its folder."""
    return {key: value for key, value in read(check_run_directory(path)).items() if key != "out"}


def _settings_of_checkpoint(path: Path) -> Mapping[str, Any]:
    from omniq.run.origin import scheme_of  # imports torch

    return {"scheme": scheme_of(path)}
