# SPDX-License-Identifier: Apache-2.0
"""Results side by side: a table to look at and a JSON file to keep."""

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rich.table import Column, Table

from omniq.evaluate.result import PerplexityResult
from omniq.storage.atomic import atomic_write


def perplexity_table(results: Mapping[str, PerplexityResult], title: str | None = None) -> Table:
    """A row a model; from the second on, how much worse it is than the first (full precision, usually).

    Args:
        results: by name, the one to compare with first.
        title: such as the text that was evaluated.
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
    """Write results as JSON, whole or not at all.

    Args:
        path: the file.
        results: by name.
        **about: what else is worth knowing (text, seed, digest of the tokens), beside ``results`` in the file.

    Raises:
        UserError: the disk is full or the folder cannot be written.
    """
    content = {**about, "results": {name: result.to_json() for name, result in results.items()}}
    atomic_write(path, (json.dumps(content, indent=2, allow_nan=False) + "\n").encode())


def _change(change: float) -> str:
    """In percent; nothing where one of the two is infinite or not a number."""
    return f"{change:+.1%}" if math.isfinite(change) else ""


def _short(perplexity: float) -> str:
    """Two decimals up to a thousand, powers of ten beyond a million."""
    if perplexity < 1e3:
        return f"{perplexity:.2f}"
    return f"{perplexity:.0f}" if perplexity < 1e6 else f"{perplexity:.2g}"
