# SPDX-License-Identifier: Apache-2.0
"""Where text comes from: a source gives plain documents and can say in one line what it is.

``Stdlib`` needs nothing but Python, ``LocalText`` a file, ``HubText`` the Hugging Face hub. Each is chosen in YAML by
``class_path``; a new source is a class with ``documents`` and ``describe``. Windows of tokens are cut from the
documents of a source joined by its separator (``omniq.data.windows``).

Local json and parquet files are read through ``datasets`` in streaming mode: its cache is keyed by path, size and time
of modification and would return old rows after an edit that keeps these three.
"""

import hashlib
import itertools
import logging
import os
import platform
from abc import ABC, abstractmethod
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from omniq.errors import UserError, one_line
from omniq.storage.atomic import expanded

READERS = {".txt": "text", ".md": "text", ".json": "json", ".jsonl": "json", ".parquet": "parquet"}
"""How a local file is read, by its extension."""

HELD_OUT_SHARE = 5
"""One character in five of the standard library's documentation is held out."""

SHARED_PARAGRAPH = 80
"""Characters (about one line) from which a paragraph that appears in two topics counts as a repetition."""


class TextSource(ABC):
    """Documents of plain text."""

    separator: str = "\n\n"  # a blank line, as in the paper's code (wikitext joined by "\n\n")

    @abstractmethod
    def documents(self) -> list[str]:
        """The documents, in a fixed order.

        Raises:
            UserError: the text cannot be read.
        """

    @abstractmethod
    def describe(self) -> str:
        """One line for the model card: what the text is, without a path of this machine."""

    def text(self) -> str:
        """All documents as one string."""
        return self.separator.join(self.documents())


@dataclass(frozen=True)
class Stdlib(TextSource):
    """The documentation that comes with Python (``pydoc_data.topics``), split by topic.

    Topics quote each other at length (``specialnames`` holds all of ``customization``), so a paragraph is kept only in
    the first topic, by name, that has it. Then, in the order of the SHA-256 of their names, topics are held out as
    long as they fit into a fifth of the characters; the others are for calibration.

    Args:
        split: ``calibration`` (about 80 % of the characters) or ``held-out``.
    """

    split: Literal["calibration", "held-out"] = "calibration"

    def topics(self) -> dict[str, str]:
        """The topics of the split, sorted by name."""
        every = _distinct_topics()
        room = sum(map(len, every.values())) // HELD_OUT_SHARE
        held_out = set()
        for name in sorted(every, key=lambda name: hashlib.sha256(name.encode()).digest()):
            if len(every[name]) <= room:
                room -= len(every[name])
                held_out.add(name)
        return {name: text for name, text in every.items() if (name in held_out) == (self.split == "held-out")}

    def documents(self) -> list[str]:
        """One document a topic."""
        return list(self.topics().values())

    def describe(self) -> str:
        """The version of Python, and the split."""
        version = ".".join(platform.python_version_tuple()[:2])
        return f"documentation of the Python {version} standard library (pydoc_data.topics), {self.split} split"


@dataclass(frozen=True)
class LocalText(TextSource):
    """A file of text.

    Args:
        path: ``.txt`` or ``.md`` (one document), ``.jsonl`` or ``.json`` (one document a row), ``.parquet``.
        field: the column that holds the text of a row; not used for ``.txt`` and ``.md``.
        separator: what joins the documents.
        max_documents: how many documents to read from the front; all if not given.
    """

    path: str
    field: str = "text"
    separator: str = "\n\n"
    max_documents: int | None = None

    def __post_init__(self) -> None:
        at_least("LocalText.max_documents", self.max_documents, 1)

    def documents(self) -> list[str]:
        """Read the file.

        Raises:
            UserError: the file is missing, empty, of an unknown kind, damaged, or has no such field.
        """
        path = expanded(self.path)
        kind = READERS.get(path.suffix.lower())
        if not path.is_file():
            reason = "is a folder, not a file" if path.is_dir() else "does not exist"
            raise UserError(f"LocalText.path: {self.path!r} {reason}; give a file of text ({', '.join(READERS)})")
        if kind is None:
            known = ", ".join(READERS)
            raise UserError(f"LocalText.path: {self.path!r} has an unknown extension; known are {known}")
        if not path.stat().st_size:
            raise UserError(f"LocalText.path: {self.path!r} is empty; give a file with text in it")
        try:
            found = [_read_text(path)] if kind == "text" else self._rows(kind, path)
        except (OSError, ValueError) as error:  # damaged json and parquet, wrong encoding, no permission
            raise UserError(f"LocalText.path: {self.path!r} cannot be read as {kind}: {one_line(error)}") from error
        if not any(map(str.strip, found)):
            raise UserError(f"LocalText.path: {self.path!r} holds no text; give a file with text in it")
        return found

    def _rows(self, kind: str, path: Path) -> list[str]:
        with _quiet_datasets() as datasets:
            rows = datasets.load_dataset(kind, data_files=str(path), split="train", streaming=True)
            return _field(rows, self.field, self.max_documents, self.path)

    def describe(self) -> str:
        """The file's name and the digest of its content."""
        path = expanded(self.path)
        content = hashlib.sha256(path.read_bytes()).hexdigest()
        return f"{path.name} (SHA-256 {content[:16]}{_first(self.max_documents)})"


@dataclass(frozen=True)
class HubText(TextSource):
    """A data set of the Hugging Face hub, or a folder laid out like one.

    Args:
        path: such as ``Salesforce/wikitext`` or ``allenai/c4``.
        name: the configuration, such as ``wikitext-2-raw-v1``.
        split: such as ``train`` or ``test``.
        field: the column that holds the text of a row.
        data_files: the files to read instead of all, such as ``en/c4-train.00000-of-01024.json.gz``.
        revision: a commit or tag of the data set; its newest if not given.
        streaming: read rows over the network as they are needed instead of downloading whole files first.
        max_documents: how many rows to read from the front; all if not given.
        separator: what joins the rows.
    """

    path: str
    name: str | None = None
    split: str = "train"
    field: str = "text"
    data_files: str | None = None
    revision: str | None = None
    streaming: bool = False
    max_documents: int | None = None
    separator: str = "\n\n"

    def __post_init__(self) -> None:
        at_least("HubText.max_documents", self.max_documents, 1)

    def documents(self) -> list[str]:
        """Read the rows.

        Raises:
            UserError: the hub cannot be reached, or has no such data set, configuration, split, file or field.
        """
        with _quiet_datasets() as datasets:
            try:
                rows = datasets.load_dataset(
                    self.path,
                    self.name,
                    split=self.split,
                    data_files={self.split: self.data_files} if self.data_files else None,
                    revision=self.revision,
                    streaming=self.streaming,
                )
                found = _field(rows, self.field, self.max_documents, self.path)
            except ConnectionError as error:
                remedy = _unreachable(datasets.config.HF_HUB_OFFLINE)
                raise UserError(f"HubText.path: {self.path!r} {remedy}") from error
            except (OSError, ValueError, datasets.exceptions.DatasetsError) as error:
                raise UserError(f"HubText.path: {self.path!r} cannot be read: {one_line(error)}") from error
        if not any(map(str.strip, found)):
            raise UserError(f"HubText.path: {self.path!r} holds no text in split {self.split!r}; name another split")
        return found

    def describe(self) -> str:
        """Name (of a folder its last part), configuration, split, and what was left out."""
        path = Path(self.path).resolve().name if Path(self.path).is_dir() else self.path
        parts = [path, self.name, self.data_files, f"revision {self.revision}" if self.revision else None]
        return f"{' '.join(part for part in parts if part)} ({self.split} split{_first(self.max_documents)})"


def at_least(name: str, value: int | None, least: int) -> None:
    """Refuse a number that is given and too small.

    Raises:
        UserError: names the setting, the number and the least that will do.
    """
    if value is not None and value < least:
        raise UserError(f"{name}: {value} is too few; give {least} or more")


def _distinct_topics() -> dict[str, str]:
    """Python's documentation by topic, sorted by name, no longer paragraph twice."""
    try:
        from pydoc_data.topics import topics
    except ModuleNotFoundError as error:  # some distributions package it apart
        raise UserError("Stdlib: this Python came without pydoc_data; use omniq.data.LocalText instead") from error
    seen: set[str] = set()
    distinct = {}
    for name in sorted(topics):
        kept = []
        for paragraph in topics[name].split("\n\n"):
            words = " ".join(paragraph.split())  # copies differ in indentation
            if words not in seen:
                kept.append(paragraph)
            if len(words) >= SHARED_PARAGRAPH:
                seen.add(words)
        if any(map(str.strip, kept)):
            distinct[name] = "\n\n".join(kept)
    return distinct


def _read_text(path: Path) -> str:
    return path.read_text(encoding="utf-8-sig")  # drops the byte order mark that some editors put first


def _field(rows: Any, field: str, limit: int | None, path: str) -> list[str]:
    """The text of each row, of the first ``limit`` at most."""
    found = []
    try:
        for number, row in enumerate(itertools.islice(rows, limit), start=1):
            if field not in row:
                raise UserError(f"field: {path!r} has no field {field!r}; set it to one of {', '.join(map(repr, row))}")
            if not isinstance(row[field], str):
                raise UserError(f"field: {path!r} row {number} has {row[field]!r} where {field!r} should be text")
            found.append(row[field])
    except StopIteration:  # datasets lets it escape where a file has no row
        return []
    return found


def _first(limit: int | None) -> str:
    return f", first {limit} documents" if limit else ""


def _unreachable(offline: bool) -> str:
    remedy = "to read a file instead, set class_path: omniq.data.LocalText and init_args: {path: FILE}"
    if not offline:
        return f"cannot be fetched: the Hugging Face hub is unreachable; {remedy}"
    switches = ("HF_DATASETS_OFFLINE", "HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE")
    switch = next(name for name in switches if os.environ.get(name))
    return f"is not in the local cache, and {switch}={os.environ[switch]} forbids the hub; unset it, or {remedy}"


@contextmanager
def _quiet_datasets() -> Iterator[Any]:
    """Import ``datasets`` (half a second), and keep logs from repeating what our one line says."""
    import datasets

    levels = {name: logging.getLogger(name).level for name in ("datasets", "huggingface_hub")}
    for name in levels:
        logging.getLogger(name).setLevel(logging.CRITICAL)
    try:
        yield datasets
    finally:
        for name, level in levels.items():
            logging.getLogger(name).setLevel(level)
