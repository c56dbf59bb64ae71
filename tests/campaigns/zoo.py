# SPDX-License-Identifier: Apache-2.0
"""Quantize a tiny model of every decoder-only type of transformers, and compare its export with independent code.

    python -m tests.campaigns.zoo --methods RTN LWC QuantEase --only "gpt_neox" "falcon 40b"

Each variant of ``tests.helpers.zoo`` is saved, quantized at W4A16g32 with float32 scales (symmetric if it has experts),
and exported. The export is reopened in plain transformers. Its logits are compared with those of the stock model into
which ``tests.helpers.independent`` has written ``(q - z) * s``. The script prints a table and the counts, and exits 1
if a variant fails in any other way than a refusal before calibration.
"""

import argparse
import contextlib
import io
import logging
import os
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM

from omniq.config.parse import parse_run
from omniq.errors import NotByBlocks, UserError
from omniq.models.propose import expert_of
from omniq.models.source import SourceModel
from omniq.run import loop
from tests.helpers.independent import dequantized_source, relative_error
from tests.helpers.runs import write_text
from tests.helpers.tiny import tiny_tokenizer
from tests.helpers.zoo import VARIANTS, zoo_model

MOST = 1e-6  # relative error of the logits
METHODS: dict[str, list[dict[str, Any]]] = {
    "RTN": [{"class_path": "omniq.stages.RTN"}],
    "LWC": [{"class_path": "omniq.stages.OmniQuant", "init_args": {"epochs": 1}}],
    "QuantEase": [{"class_path": "omniq.stages.QuantEase", "init_args": {"sweeps": 3}}],
}


@dataclass
class Row:
    """The outcome of one variant with one method; ``failure`` is empty if it works."""

    name: str
    method: str
    blocks: int = 0
    linears: int = 0
    kept: int = 0
    equivalences: str = ""
    error: float = float("nan")
    seconds: float = 0.0
    refused: str = ""
    failure: str = ""

    def line(self) -> str:
        """The row of the table."""
        if message := self.refused or self.failure:
            return f"{self.name:22}{self.method:10}{'refused' if self.refused else 'FAILED'}: {message}"
        numbers = f"{self.blocks:7}{self.linears:8}{self.kept:6}"
        return f"{self.name:22}{self.method:10}{numbers}{self.error:10.1e}{self.seconds:6.1f}  {self.equivalences}"


def describe(row: Row, folder: Path) -> bool:
    """Fill in what the layouts say: blocks, kept tensors, verified equivalences by kind.

    Returns:
        True if the model has experts, of which transformers reads only symmetric grids.
    """
    source = SourceModel.open(folder)
    layouts = [source.layout(index) for index in range(source.num_blocks)]
    kinds = [each.kind for layout in layouts for each in layout.equivalences]
    row.blocks, row.kept = len(layouts), sum(len(layout.kept) for layout in layouts)
    row.equivalences = ", ".join(f"{kinds.count(kind)} {kind}" for kind in dict.fromkeys(kinds))
    return any(expert_of(name) for layout in layouts for name in layout.linears)


def settings(folder: Path, method: str, symmetric: bool) -> dict[str, Any]:
    """The sections of a run."""
    text = {"class_path": "omniq.data.LocalText", "init_args": {"path": str(folder / "text.txt")}}
    return {
        "model": {"path": str(folder / "source")},
        "data": {"source": text, "samples": 16, "length": 64, "held_out": 0},
        "evaluation": None,
        "scheme": {"name": "W4A16g32", "dtype": "float32", "symmetric": symmetric},
        "stages": METHODS[method],
        "trainer": {"accelerator": "cpu", "precision": "32-true"},
        "out": str(folder / "run"),
    }


def quantize_variant(name: str, method: str) -> Row:
    """Quantize one variant and measure its export."""
    row, start = Row(name, method), time.time()
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        zoo_model(name).save_pretrained(folder / "source")
        tiny_tokenizer().save_pretrained(folder / "source")
        write_text(folder / "text.txt", words=4000)
        try:
            symmetric = describe(row, folder / "source")
            loop.quantize(*parse_run((), settings(folder, method, symmetric)))
            export = AutoModelForCausalLM.from_pretrained(folder / "run" / "model", dtype=torch.float32).eval()
            expected, row.linears = dequantized_source(folder / "source", folder / "run" / "model", folder / "plain")
            tokens = torch.randint(0, 256, (3, 48), generator=torch.Generator().manual_seed(1))
            row.error = relative_error(export, expected.eval(), tokens)
            if not row.error <= MOST:
                row.failure = f"relative error {row.error:.1e}"
        except UserError as error:
            late = (folder / "run" / "blocks").exists() and any((folder / "run" / "blocks").iterdir())
            if late or not isinstance(error, NotByBlocks):
                row.failure = str(error)
            else:
                row.refused = str(error)
        except Exception as error:  # any other error is a fault of omniq, to be shown in the table
            row.failure = f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
    row.seconds = time.time() - start
    return row


def main() -> int:
    """Run the variants; return the exit status."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--methods", nargs="+", default=["RTN"], choices=list(METHODS))
    parser.add_argument("--only", nargs="+", default=list(VARIANTS), help="names of variants")
    arguments = parser.parse_args()
    logging.disable(logging.WARNING)
    print(f"{'variant':22}{'method':10}{'blocks':>7}{'linears':>8}{'kept':>6}{'error':>10}{'s':>6}  equivalences")
    rows = []
    for name in arguments.only:
        for method in arguments.methods:
            with (
                open(os.devnull, "w") as nowhere,
                contextlib.redirect_stderr(nowhere),
                contextlib.redirect_stdout(io.StringIO()),
            ):
                row = quantize_variant(name, method)
            rows.append(row)
            print(row.line(), flush=True)
    failed, refused = (sum(bool(getattr(row, what)) for row in rows) for what in ("failure", "refused"))
    print(f"{len(rows)} runs: {len(rows) - failed - refused} work, {refused} refused, {failed} failed")
    return int(failed > 0)


if __name__ == "__main__":
    sys.exit(main())
