# SPDX-License-Identifier: Apache-2.0
"""Sources of text: a source gives plain documents and describes itself in one line.

``Stdlib`` needs only Python, ``LocalText`` a file, ``HubText`` the Hugging Face Hub. YAML files choose a source by its
``class_path``. A new source is a class with ``documents`` and ``describe``. ``omniq.data.windows`` joins the documents
by the separator of the source and cuts windows of tokens from them.
"""

import hashlib
import os
import platform
import stat
from abc import ABC, abstractmethod
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from omniq.data.hub import dataset_rows
from omniq.data.rows import READERS, field_of
from omniq.errors import UserError, one_line
from omniq.storage.atomic import expand_home

HELD_OUT_SHARE = 5
"""One character in five of the standard library's documentation is held out."""

SHARED_PARAGRAPH = 80
"""The least length, in characters (about one line), of a paragraph whose repetitions are removed."""


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
        """One line for the model card that says what the text is, without a path of this machine."""

    def text(self) -> str:
        """All documents as one string."""
        return self.separator.join(self.documents())


@dataclass(frozen=True)
class Stdlib(TextSource):
    """The documentation that comes with Python (``pydoc_data.topics``), split by topic.

    Topics quote each other at length (``specialnames`` contains all of ``customization``), so only the first topic by
    name keeps a repeated paragraph. Topics are then held out in the order of the SHA-256 of their names, as long as
    they fit into a fifth of the characters; the other topics are for calibration.

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
        """One document per topic."""
        return list(self.topics().values())

    def describe(self) -> str:
        """The Python version and the split."""
        version = ".".join(platform.python_version_tuple()[:2])
        return f"documentation of the Python {version} standard library (pydoc_data.topics), {self.split} split"


@dataclass(frozen=True)
class LocalText(TextSource):
    """A local text file.

    Args:
        path: ``.txt`` or ``.md`` (one document), ``.jsonl``, ``.json`` or ``.parquet`` (one document per row).
        field: the column that holds the text of a row; not used for ``.txt``, ``.md`` and a list of strings.
        separator: the text between two documents.
        max_documents: the number of documents to read, from the start; all by default.
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
            UserError: the file is missing, empty or damaged, has an unknown extension, or lacks the field.
        """
        path = expand_home(self.path)
        self._check(path)
        kind, reader = READERS[path.suffix.lower()]
        try:
            found = field_of(reader(path, self.field), self.field, self.max_documents, self.path)
        except UserError:
            raise
        except Exception as error:  # libraries raise many kinds for damaged files
            raise UserError(
                f"LocalText.path: {self.path!r} cannot be read as {kind}: {one_line(error)}; give an intact file"
            ) from error
        if not any(map(str.strip, found)):
            raise UserError(f"LocalText.path: {self.path!r} holds no text; give a file with text in it")
        return found

    def _check(self, path: Path) -> None:
        """Refuse what is not a file with content and a known extension, before it is opened."""
        known = ", ".join(READERS)
        try:
            status = path.stat()
        except (OSError, ValueError) as error:  # ValueError for a NUL character in the path
            missing = "is a link to a file that does not exist" if os.path.islink(path) else "does not exist"
            wrong = missing if isinstance(error, FileNotFoundError) else f"cannot be opened ({one_line(error)})"
            raise UserError(f"LocalText.path: {self.path!r} {wrong}; give a file of text ({known})") from error
        if not stat.S_ISREG(status.st_mode):
            wrong = "is a folder, not a file" if stat.S_ISDIR(status.st_mode) else "is a device or a pipe, not a file"
            raise UserError(f"LocalText.path: {self.path!r} {wrong}; give a file of text ({known})")
        if path.suffix.lower() not in READERS:
            raise UserError(f"LocalText.path: {self.path!r} has an unknown extension; known are {known}")
        if not status.st_size:
            raise UserError(f"LocalText.path: {self.path!r} is empty; give a file with text in it")

    def describe(self) -> str:
        """The name of the file and the digest of its content."""
        path = expand_home(self.path)
        content = hashlib.sha256(path.read_bytes()).hexdigest()
        return f"{path.name} (SHA-256 {content[:16]}{_first(self.max_documents)})"


@dataclass(frozen=True)
class HubText(TextSource):
    """A data set on the Hugging Face Hub, or a local folder with the same layout.

    Args:
        path: such as ``Salesforce/wikitext`` or ``allenai/c4``. The path of a folder is literal, not a pattern.
        name: the configuration, such as ``wikitext-2-raw-v1``.
        split: such as ``train`` or ``test``.
        field: the column that holds the text of a row.
        data_files: the files to read instead of all files, such as ``en/c4-train.00000-of-01024.json.gz``. It is a
            pattern: ``*``, ``?`` and ``[`` match as in a shell.
        revision: a commit or tag of the data set; the newest by default.
        streaming: read rows over the network as they are needed, without downloading whole files first.
        max_documents: the number of rows to read, from the start; all by default.
        separator: the text between two rows.
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
            UserError: the Hub cannot be reached, or lacks the data set, configuration, split, file or field.
        """
        rows = dataset_rows(self.path, self.name, self.split, self.data_files, self.revision, self.streaming)
        with rows as opened:
            found = field_of(opened, self.field, self.max_documents, self.path)
        if not any(map(str.strip, found)):
            raise UserError(f"HubText.path: {self.path!r} holds no text in split {self.split!r}; name another split")
        return found

    def describe(self) -> str:
        """Name (for a folder its last component), configuration, files, revision, split, and the limit of rows."""
        path = Path(self.path).resolve().name if Path(self.path).is_dir() else self.path
        parts = [path, self.name, self.data_files, f"revision {self.revision}" if self.revision else None]
        return f"{' '.join(part for part in parts if part)} ({self.split} split{_first(self.max_documents)})"


def at_least(name: str, value: int | None, least: int) -> None:
    """Refuse a number below a minimum; None passes.

    Raises:
        UserError: names the setting, the number and the minimum.
    """
    if value is not None and value < least:
        raise UserError(f"{name}: {value} is too few; give {least} or more")


def _distinct_topics() -> dict[str, str]:
    """Python's documentation by topic, sorted by name, without repeated paragraphs."""
    try:
        from pydoc_data.topics import topics
    except ModuleNotFoundError as error:  # some distributions have a separate package for it
        raise UserError("Stdlib: this Python lacks the module pydoc_data; use omniq.data.LocalText instead") from error
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


def _first(limit: int | None) -> str:
    return f", first {limit} documents" if limit else ""
