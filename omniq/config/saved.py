# SPDX-License-Identifier: Apache-2.0
"""The configuration of a run directory, which may come from somebody else.

What is done with a finished run needs its model, its scheme, its stages and the precision it was calibrated in. The
other sections are left out before anything is parsed, so that no class that they name is imported.
"""

from pathlib import Path
from typing import Any

from omniq.config.compose import read
from omniq.config.parse import parse_run
from omniq.config.run import Run
from omniq.errors import UserError

RUN_AGAIN = "run its quantize command again, which writes it anew"


def check_run_directory(path: Path) -> Path:
    """The file with the configuration of a run.

    Raises:
        UserError: no run lives there.
    """
    config = path / "config.yaml"
    if not config.is_file():
        raise UserError(f"run {path} is not a run directory: it has no config.yaml; give the out of a quantize command")
    return config


def open_run(path: Path) -> tuple[Run, str]:
    """The configuration of a run directory without text, callbacks and logger, and all of its settings as YAML.

    Raises:
        UserError: no run lives there, or its configuration is damaged.
    """
    config = check_run_directory(path)
    try:
        content = read(config)
        trainer = content.get("trainer") or {}
        arguments = trainer.get("init_args", trainer)
        kept: dict[str, Any] = {key: content[key] for key in ("model", "scheme", "stages") if key in content}
        precision = {"precision": arguments["precision"]} if arguments.get("precision") is not None else {}
        run, _ = parse_run([], {**kept, "data": {"source": "omniq.data.Stdlib"}, "trainer": precision})
        return run, config.read_text(encoding="utf-8")
    except (UserError, AttributeError) as error:  # the last if a section is not a mapping
        raise UserError(f"{config} cannot be read ({error}): {RUN_AGAIN}") from error
