# SPDX-License-Identifier: Apache-2.0
"""Rows of a local file, and the text of rows.

Files are opened by their literal path and read as streams, without ``datasets``. That library takes ``[``, ``*``, ``?``
and ``::`` in a path for a pattern, needs a cache that can be written even for a local file, and ends the process on a
line of json that is nested thousands of levels deep.
"""

import json
import re
import reprlib
from collections.abc import Callable, Iterable, Iterator
from itertools import islice
from pathlib import Path
from typing import Any

from omniq.errors import UserError


def text_row(path: Path, field: str) -> Iterator[dict[str, Any]]:
    """The whole file as ``field`` of one row, decoded as UTF-8 without a byte order mark.

    Raises:
        ValueError: it is not UTF-8, or holds a NUL character.
    """
    text = path.read_text(encoding="utf-8-sig")
    if "\0" in text:
        raise ValueError("it holds NUL characters, so it is binary or in another encoding than UTF-8")
    yield {field: text}


def json_rows(path: Path, field: str) -> Iterator[dict[str, Any]]:
    """Rows of JSON: an object per line, a list of objects or of strings, or objects of several lines each.

    A string in a list is ``field`` of a row. Files with an object per line are read line by line, so the
    first rows of a large file are found at once.

    Raises:
        ValueError: the JSON is damaged or nested too deeply, or a row is not an object; names the line or row.
    """
    for number, row in enumerate(_values(path), start=1):
        row = {field: row} if isinstance(row, str) else row
        if not isinstance(row, dict):
            raise ValueError(f"row {number} is {reprlib.repr(row)}, which is not an object")
        yield row


def parquet_rows(path: Path, field: str) -> Iterator[dict[str, Any]]:
    """Rows of a parquet file with only the column ``field``; with all columns if there is no such column.

    Raises:
        OSError, ValueError, pyarrow.ArrowException: the file is damaged.
    """
    from pyarrow.parquet import ParquetFile

    with path.open("rb") as file, ParquetFile(file) as table:  # pyarrow would take a path for a URL or a folder
        columns = [field] if field in table.schema_arrow.names else None
        for batch in table.iter_batches(columns=columns):
            yield from batch.to_pylist()


READERS: dict[str, tuple[str, Callable[[Path, str], Iterator[dict[str, Any]]]]] = {
    ".txt": ("text", text_row),
    ".md": ("text", text_row),
    ".json": ("json", json_rows),
    ".jsonl": ("json", json_rows),
    ".parquet": ("parquet", parquet_rows),
}
"""The content of a local file and its reader, by file extension."""


def field_of(rows: Iterable[dict[str, Any]], field: str, limit: int | None, path: str) -> list[str]:
    """The text of every row, or of the first ``limit`` rows.

    Raises:
        UserError: a row lacks the field, or has something other than Unicode text there.
    """
    found: list[str] = []
    try:
        for number, row in enumerate(islice(rows, limit), start=1):
            if field not in row:
                known = ", ".join(map(repr, row)) or "none, the row is empty"
                where = repr(path) if number == 1 else f"{path!r} row {number}"
                raise UserError(f"field: {where} has no field {field!r}; set it to one of {known}")
            text = row[field]
            if not isinstance(text, str):
                raise UserError(
                    f"field: {path!r} row {number} has {reprlib.repr(text)} where {field!r} should be text; "
                    "name another field or mend the row"
                )
            if not _is_unicode(text):
                raise UserError(f"field: {path!r} row {number} has half a surrogate pair in {field!r}; mend the row")
            found.append(text)
    except StopIteration:  # datasets lets it escape if a file has no row
        return []
    return found


def _is_unicode(text: str) -> bool:
    """Whether a tokenizer takes the text; JSON may escape one half of a surrogate pair."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def _values(path: Path) -> Iterator[Any]:
    """One JSON value per line or, if the first line is not a value by itself, what ``_spread_values`` finds."""
    with path.open(encoding="utf-8-sig", newline="\n") as file:
        lines = ((number, line) for number, line in enumerate(file, start=1) if not line.isspace())
        for count, (number, line) in enumerate(lines):
            try:
                value = json.loads(line)
            except RecursionError as error:
                raise ValueError(f"line {number} is nested too deeply") from error
            except json.JSONDecodeError as error:
                if not count:
                    break
                raise ValueError(f"line {number} column {error.colno}: {error.msg}") from error
            yield from value if isinstance(value, list) and not count else [value]
        else:
            return
    yield from _spread_values(path.read_text(encoding="utf-8-sig"))


def _spread_values(text: str) -> Iterator[Any]:
    """JSON values of several lines each, one after the other; the items of the list that stands at the start."""
    decoder, place = json.JSONDecoder(), _after_space(text, 0)
    start = place
    while place < len(text):
        try:
            value, end = decoder.raw_decode(text, place)
        except RecursionError as error:
            raise ValueError("it is nested too deeply") from error
        yield from value if isinstance(value, list) and place == start else [value]
        place = _after_space(text, end)


def _after_space(text: str, place: int) -> int:
    found = re.compile(r"\S").search(text, place)
    return len(text) if found is None else found.start()
