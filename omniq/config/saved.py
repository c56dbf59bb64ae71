# SPDX-License-Identifier: Apache-2.0
"""The configuration of a run directory, which may come from another person.

Commands on a finished run need its model, scheme, stages and calibration precision. This module drops all other
sections before it parses the file, so that no class that they name is imported.
"""

from pathlib import Path
from typing import Any

from omniq.config.compose import read
from omniq.config.parse import parse_run
from omniq.config.run import Run
from omniq.errors import UserError
from omniq.grid.scheme import Scheme
from omniq.storage.ownership import check_entries

_LIGHT = {"data": {"source": "omniq.data.Stdlib"}, "stages": [{"class_path": "omniq.stages.RTN"}]}
RUN_AGAIN = "run its quantize command again to rewrite it"


def check_run_directory(path: Path) -> Path:
    """Return the path of a run's configuration file.

    Raises:
        UserError: the path is not a run directory, or an entry of it is a link or has another wrong type.
    """
    config = path / "config.yaml"
    if not config.is_file():
        raise UserError(f"run {path} is not a run directory: it has no config.yaml; give the out of a quantize command")
    check_entries(path)
    return config


def open_run(path: Path) -> tuple[Run, str]:
    """Read the configuration of a run without text, callbacks and logger; also return all of its settings as YAML.

    Raises:
        UserError: the path is not a run directory, or its configuration is damaged.
    """
    config = check_run_directory(path)
    try:
        content = read(config)
        trainer = content.get("trainer") or {}
        arguments = trainer.get("init_args", trainer)
        kept: dict[str, Any] = {key: content[key] for key in ("model", "scheme", "stages") if key in content}
        precision = {"precision": arguments["precision"]} if arguments.get("precision") is not None else {}
        numbers = {key: value for key, value in (content.get("data") or {}).items() if key == "held_out"}
        data = {**numbers, "source": "omniq.data.Stdlib"}  # a stage of the whole model requires held-out windows
        run, _ = parse_run([], {**kept, "data": data, "trainer": precision})
        return run, config.read_text(encoding="utf-8")
    except (UserError, AttributeError) as error:  # AttributeError if a section is not a mapping
        raise UserError(f"{config} cannot be read ({error}): {RUN_AGAIN}") from error


def recipe_scheme(file: Path) -> Scheme:
    """The scheme of a recipe, which lies beside the weights of an exported model. No class that it names is imported.

    Raises:
        UserError: the file is missing or damaged.
    """
    try:
        return parse_run([], {"model": {"path": "."}, "scheme": read(file)["scheme"], **_LIGHT})[0].scheme
    except (UserError, KeyError, TypeError) as error:
        raise UserError(f"{file} cannot be read as a recipe of omniq ({error}): export the model again") from error
