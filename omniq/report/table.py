# SPDX-License-Identifier: Apache-2.0
"""Perplexity results as a table and as a JSON file; the line of a stage of the whole model."""

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rich.table import Column, Table

from omniq.evaluate.result import PerplexityResult
from omniq.storage.atomic import atomic_write

_KL = {"held_out_kl.before": "before", "held_out_kl": "after"}


def perplexity_table(results: Mapping[str, PerplexityResult], title: str | None = None) -> Table:
    """Make a table with one row per model, and the relative change from the first model (usually full precision).

    Args:
        results: results by name. The first result is the reference.
        title: the title of the table, such as the evaluated text.
    """
    table = Table(Column("model", overflow="fold"), title=title)
    for column in ("perplexity", "change", "nll (nats)", "tokens", "seconds"):
        table.add_column(column, justify="right")
    reference = next(iter(results.values()), None)
    for name, result in results.items():
        table.add_row(
            name,
            _short(result.perplexity),
            "" if result is reference or reference is None else _change(result.perplexity / reference.perplexity - 1),
            f"{result.nll:.4f}",
            f"{result.tokens:,}",
            f"{result.seconds:.1f}",
        )
    return table


def write_results(path: Path, results: Mapping[str, PerplexityResult], **about: Any) -> None:
    """Write results as JSON, atomically.

    Args:
        path: the file.
        results: results by name.
        **about: further entries of the file (text, seed, digest of the tokens), next to ``results``.

    Raises:
        UserError: the disk is full or the folder cannot be written.
    """
    content = {**about, "results": {name: result.to_json() for name, result in results.items()}}
    atomic_write(path, (json.dumps(content, indent=2, allow_nan=False) + "\n").encode())


def _change(change: float) -> str:
    """Format a relative change in percent; an infinite or undefined change gives empty text."""
    return f"{change:+.1%}" if math.isfinite(change) else ""


def _short(perplexity: float) -> str:
    """Format with two decimals below a thousand, and in powers of ten from a million."""
    if perplexity < 1e3:
        return f"{perplexity:.2f}"
    return f"{perplexity:.0f}" if perplexity < 1e6 else f"{perplexity:.2g}"


def model_line(notes: Mapping[str, Any]) -> str:
    """Describe a finished stage of the whole model in one line.

    Args:
        notes: its entry in ``model_stages.json``.
    """
    kl = ", ".join(f"{notes[key]:.4g} {when}" for key, when in _KL.items() if key in notes)
    parts = ["model", notes["stage"], f"held-out KL {kl}" if kl else "", notes.get("guard", "")]
    return "  ".join([*(part for part in parts if part), f"{notes['seconds']:.1f} s"])
