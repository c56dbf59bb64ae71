# SPDX-License-Identifier: Apache-2.0
"""``omniq report``: the losses and perplexities of a run, finished or not."""

from pathlib import Path

from rich.table import Table

from omniq.evaluate.perplexity import PerplexityResult
from omniq.report.console import plain_console
from omniq.report.table import perplexity_table
from omniq.run.saved import open_run
from omniq.storage.atomic import expanded
from omniq.storage.run_dir import RunDir
from omniq.storage.sealed import load_record


def show_run(path: Path) -> None:
    """Print the losses of every finished block, and the perplexities if they were measured.

    Raises:
        UserError: no run lives there.
        CorruptFile: a file of it is damaged; it stays where it is.
    """
    path = expanded(path)
    open_run(path)
    folder, console = RunDir(path), plain_console()
    keys = ("loss", "relative_loss", "held_out_loss", "relative_held_out_loss", "seconds")
    # Headers of several words are broken between them where a terminal is narrow.
    table = Table("block", *(key.replace("_", " ").replace("held out", "held-out") for key in keys), "notes")
    table.title = str(path)
    for index in folder.finished():
        summary = folder.read_block(index).summary
        values = [f"{summary[key]:.4g}" if key in summary else "" for key in keys]
        table.add_row(str(index), *values, str(summary.get("guard", "")))
    console.print(table)
    if (path / "perplexity.json").exists():
        measured = load_record(path / "perplexity.json")
        rows = {name: PerplexityResult.from_json(entry) for name, entry in measured["models"].items()}
        console.print(perplexity_table(rows, title=measured["text"]))
