# SPDX-License-Identifier: Apache-2.0
"""``omniq report``: the losses and perplexities of a run, finished or not.

Reads JSON and the headers of safetensors files, and needs no torch. The configuration of the run is not parsed, so a
report on a directory from somebody else imports no class that its ``config.yaml`` names.
"""

from pathlib import Path

from rich.table import Table

from omniq.config.saved import check_run_directory
from omniq.evaluate.result import PerplexityResult
from omniq.report.console import plain_console
from omniq.report.table import perplexity_table
from omniq.storage.atomic import expanded
from omniq.storage.records import block_path, finished_blocks, load_record, load_summary


def show_run(path: Path) -> None:
    """Print the losses of every finished block, and the perplexities if they were measured.

    Raises:
        UserError: the path is not a run directory.
        CorruptFile: a file of the run is damaged; it stays where it is.
    """
    path = expanded(path)
    check_run_directory(path)
    console = plain_console()
    keys = ("loss", "relative_loss", "held_out_loss", "relative_held_out_loss", "seconds")
    # Headers of several words are broken between them where a terminal is narrow.
    table = Table("block", *(key.replace("_", " ").replace("held out", "held-out") for key in keys), "notes")
    table.title = str(path)
    for index in finished_blocks(path):
        summary = load_summary(block_path(path, index))
        values = [f"{summary[key]:.4g}" if key in summary else "" for key in keys]
        notes = "; ".join(summary[key] for key in ("guard", "unreached") if key in summary)
        table.add_row(str(index), *values, notes)
    console.print(table)
    if (path / "perplexity.json").exists():
        measured = load_record(path / "perplexity.json")
        rows = {name: PerplexityResult.from_json(entry) for name, entry in measured["models"].items()}
        console.print(perplexity_table(rows, title=measured["text"]))
