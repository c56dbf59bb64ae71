# SPDX-License-Identifier: Apache-2.0
"""What can be done with a run directory afterwards: another export, and a look at its losses."""

import json
from pathlib import Path

from rich.console import Console
from rich.table import Table

from omniq.cli import parse_run
from omniq.config import Export, Run
from omniq.errors import UserError
from omniq.evaluate.perplexity import PerplexityResult
from omniq.evaluate.table import perplexity_table
from omniq.export import check_output, find_format
from omniq.preflight import open_model
from omniq.result import BlockResult
from omniq.run_dir import RunDir
from omniq.wrap_up import write_checkpoint


def open_run(path: Path) -> Run:
    """The configuration a run directory was made with.

    Raises:
        UserError: no run lives there.
    """
    config = path / "config.yaml"
    if not config.is_file():
        raise UserError(f"run {path} is not a run directory: it has no config.yaml; give the out of a quantize command")
    return parse_run([config])[0]


def export_run(path: Path, out: Path, export: Export) -> None:
    """Write another checkpoint of a finished run.

    Raises:
        UserError: no such run, it is not finished, the format cannot hold it, or ``out`` holds something else.
    """
    run = open_run(path)
    facts = path / "summary.json"
    if not facts.is_file():
        raise UserError(f"run {path} is not finished: run its quantize command again, which continues it")
    find_format(export.format).check(run.scheme)
    check_output(out)
    with RunDir(path) as folder:
        write_checkpoint(open_model(run), folder, out, export, run.scheme, json.loads(facts.read_text()), Console())


def show_run(path: Path) -> None:
    """Print the losses of every finished block, and the perplexities if they were measured.

    Raises:
        UserError: no run lives there.
    """
    open_run(path)
    folder, console = RunDir(path), Console()
    results = {index: BlockResult.load(folder.block_path(index)) for index in folder.finished()}
    keys = ("loss", "relative_loss", "held_out_loss", "relative_held_out_loss", "seconds")
    table = Table("block", *keys, "notes", title=str(path))
    for index, result in results.items():
        values = [f"{result.summary[key]:.4g}" if key in result.summary else "" for key in keys]
        table.add_row(str(index), *values, str(result.summary.get("guard", "")))
    console.print(table)
    measured = folder.load_record("perplexity.json")
    if measured is not None:
        rows = {name: PerplexityResult.from_json(entry) for name, entry in measured["models"].items()}
        console.print(perplexity_table(rows, title=measured["text"]))
