# SPDX-License-Identifier: Apache-2.0
"""Verify an earlier export: its codes against its run or its record, and its logits in every installed runtime."""

from dataclasses import replace
from pathlib import Path

from rich.console import Console
from rich.table import Column, Table
from torch import Tensor

from omniq.config.saved import open_run, recipe_scheme
from omniq.errors import CorruptFile, UserError
from omniq.export import VerificationError, verify_checkpoint
from omniq.export.registry import Format
from omniq.export.verify.folder import (
    Row,
    check_digests,
    chosen_runtimes,
    compare_runtimes,
    count_codes,
    format_of,
)
from omniq.grid.name import CONTAINER_BITS
from omniq.models.transformers_io import open_tokenizer
from omniq.models.weight_files import weight_file
from omniq.run.checkpoint import VERIFICATION_TEXT, block_reader
from omniq.run.plan import open_model
from omniq.storage.atomic import expand_home
from omniq.storage.run_dir import RunDir

_TOKENS = 16  # llama.cpp needs a request for each position


def verify_export(path: Path, run: Path | None, runtime: str | None, model: str | None, console: Console) -> None:
    """Verify an exported folder, and print what was compared.

    Args:
        path: the folder.
        run: the run directory from which it was written; None to compare with the digests that omniq recorded.
        runtime: the only runtime to compare; None for every runtime that opens the format.
        model: the present path of the model of the run.
        console: for the table.

    Raises:
        UserError: the folder is not an export, differs from what was exported, or the runtime is unknown, does not open
            it, or is not installed.
    """
    path = expand_home(path)
    try:
        format = format_of(path)
        runtimes = chosen_runtimes(format, runtime)
        scheme = recipe_scheme(path / "recipe.yaml")
        how = _check_record(path) if run is None else _check_codes(path, format, expand_home(run), model)
        with format.container.read(path, format.codec(scheme)) as reader:
            codes, linears = count_codes(reader), len(reader.linears)
            rows = list(compare_runtimes(path, format, scheme, reader, _tokens(path), runtimes))
    except (CorruptFile, VerificationError) as error:
        raise UserError(f"model {path} is damaged: {error}; export it again") from error
    if runtime is not None and rows[0].lacking is not None:
        raise UserError(f"runtime {runtime}: {rows[0].lacking}")
    compared = how or "not compared, because an older omniq recorded no digests: name the run by --run"
    console.print(f"{path}: {codes:,} codes of {linears} linears, {compared}")
    console.print(_table(format.name, f"{codes:,}" if how else "", rows))
    for row in rows:
        if row.lacking is not None:
            console.print(f"{row.runtime}: {row.lacking}")


def _tokens(path: Path) -> Tensor:
    file = weight_file(path)
    tokenizer = open_tokenizer(path, file if file.endswith(".gguf") else None)
    tokens: Tensor = tokenizer(VERIFICATION_TEXT, return_tensors="pt").input_ids[0, :_TOKENS]
    return tokens


def _check_record(path: Path) -> str | None:
    return "as omniq wrote them" if check_digests(path) else None


def _check_codes(path: Path, format: Format, run: Path, model: str | None) -> str:
    """Compare every code and parameter with the blocks of a run; returns what was compared, in words.

    The folder does not record ``export.container_bits``, so each possible value is tried.
    """
    settings, _ = open_run(run)
    settings.model = replace(settings.model, path=model or settings.model.path)
    with RunDir(run) as folder:
        source, first = open_model(settings), None
        for bits in (None, *CONTAINER_BITS):
            try:
                verify_checkpoint(
                    path,
                    source,
                    block_reader(folder, settings),
                    scheme=settings.scheme,
                    format=format.name,
                    container_bits=bits,
                )
                return f"equal to those of run {run}"
            except (VerificationError, CorruptFile, UserError) as error:
                first = first or error
    raise VerificationError(str(first))


def _table(format: str, codes: str, rows: list[Row]) -> Table:
    names = (Column(name, no_wrap=True) for name in ("format", "runtime"))
    table = Table(*names, title="logits against omniq's own, from the dequantized weights in float32")
    for column in ("codes equal", "largest logit difference", "KL (nats)"):
        table.add_column(column, justify="right")
    for row in rows:
        if row.distance is not None:
            found = (f"{row.distance.largest:.2g}", f"{row.distance.divergence:.2g}")
            table.add_row(format, row.runtime, codes, *found)
    return table
