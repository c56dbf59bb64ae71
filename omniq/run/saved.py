# SPDX-License-Identifier: Apache-2.0
"""Export a finished run again, with other export settings."""

import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from omniq.config.run import Export, Run
from omniq.config.saved import RUN_AGAIN, open_run
from omniq.errors import UserError
from omniq.export import check_format, check_output
from omniq.models.source import SourceModel
from omniq.report.console import plain_console
from omniq.run.checkpoint import write_checkpoint
from omniq.run.checks import check_reader
from omniq.run.companions import check_companions
from omniq.run.fingerprint import fingerprint
from omniq.run.plan import open_model
from omniq.storage.atomic import expand_home
from omniq.storage.claim import read_fingerprint
from omniq.storage.run_dir import RunDir


def export_run(path: Path, out: Path, export: Export, model: str | None = None) -> None:
    """Write another checkpoint of a finished run.

    Args:
        path: the run directory.
        out: the folder to write the checkpoint to.
        export: format and other settings of the checkpoint.
        model: the present path of the model of the run. The default is the recorded path.

    Raises:
        UserError: the run does not exist or is not finished, its records are damaged, its model has changed, the format
            cannot hold it, or ``out`` holds other files.
    """
    path, out = expand_home(path), expand_home(out)
    run, settings = open_run(path)
    if model is not None:
        run.model = replace(run.model, path=model)
    facts = _facts(path)
    outliers = bool(run.stored_beside_codes)
    check_format(export.format, run.scheme, container_bits=export.container_bits, outliers=outliers)
    check_output(out)
    with RunDir(path) as folder:
        source = _open(run)
        check_format(export.format, run.scheme, source=source, container_bits=export.container_bits)
        check_reader(export.format, run.scheme)
        _check_same(folder, fingerprint(settings) | {"model digest": source.digest()}, run)
        check_companions(folder, source)
        write_checkpoint(source, folder, out, export, run, facts, plain_console())


def _open(run: Run) -> SourceModel:
    """Open the model of the run. The recorded path may be relative to another working directory."""
    try:
        return open_model(run)
    except UserError as error:
        if expand_home(run.model.path).exists():
            raise
        raise UserError(
            f"{error}; if the model of this run is elsewhere now, name its place by --model.path"
        ) from error


def _facts(path: Path) -> dict[str, Any]:
    """Read the content of the model card of a finished run."""
    file = path / "summary.json"
    if not file.is_file():
        raise UserError(f"run {path} is not finished: run its quantize command again to continue it")
    try:
        facts = json.loads(file.read_bytes())
    except ValueError:
        facts = None
    if not isinstance(facts, dict):
        raise UserError(f"{file} is damaged: {RUN_AGAIN}")
    return facts


def _check_same(folder: RunDir, now: Mapping[str, Any], run: Run) -> None:
    """Check that configuration and model are those of the finished blocks.

    Settings that only one of the two omniq versions knows are ignored.
    """
    then = read_fingerprint(folder.path)
    changed = [key for key in sorted(now.keys() & then.keys()) if now[key] != then[key]]
    if changed == ["model digest"]:
        raise UserError(
            f"model.path {run.model.path!r} is not the model that {folder.path} was made from: restore it, or give the "
            "path of that model by --model.path"
        )
    if changed:
        config = folder.path / "config.yaml"
        raise UserError(f"{config} is not the configuration of the run ({', '.join(changed)} differ): {RUN_AGAIN}")
