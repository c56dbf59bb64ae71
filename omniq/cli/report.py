# SPDX-License-Identifier: Apache-2.0
"""``omniq report``: the losses and perplexities of a finished or unfinished run.

The command reads JSON and the headers of safetensors files, without torch. It does not parse the configuration of the
run, so a report on a directory from another person imports no class that the ``config.yaml`` names.
"""

from pathlib import Path

from rich.table import Table

from omniq.config.saved import check_run_directory
from omniq.errors import CorruptFile
from omniq.evaluate.result import PerplexityResult
from omniq.report.console import plain_console
from omniq.report.table import model_line, perplexity_table
from omniq.storage.atomic import expand_home
from omniq.storage.ownership import MODEL_STAGES
from omniq.storage.records import block_path, finished_blocks, load_record, load_summary


def show_run(path: Path) -> None:
    """Print the losses of every finished block and stage of the whole model, and the perplexities if measured.

    Raises:
        UserError: the path is not a run directory.
        CorruptFile: a file of the run is damaged. The file is not removed.
    """
    path = expand_home(path)
    check_run_directory(path)
    console = plain_console()
    keys = ("loss", "relative_loss", "held_out_loss", "relative_held_out_loss", "seconds")
    # Spaces let a narrow terminal wrap the headers between words.
    table = Table("block", *(key.replace("_", " ").replace("held out", "held-out") for key in keys), "notes")
    table.title = str(path)
    for index in finished_blocks(path):
        summary = load_summary(block_path(path, index))
        values = [f"{summary[key]:.4g}" if key in summary else "" for key in keys]
        notes = "; ".join(summary[key] for key in ("guard", "unreached", "too few tokens") if key in summary)
        table.add_row(str(index), *values, notes)
    console.print(table)
    if (path / MODEL_STAGES).exists():
        for notes in load_record(path / MODEL_STAGES).values():
            console.print(model_line(notes), highlight=False)
    if (path / "perplexity.json").exists():
        measured = load_record(path / "perplexity.json")
        if not {"models", "text"} <= measured.keys():
            raise CorruptFile(f"{path / 'perplexity.json'}: it is the content of another file of a run")
        rows = {name: PerplexityResult.from_json(entry) for name, entry in measured["models"].items()}
        console.print(perplexity_table(rows, title=measured["text"]))
