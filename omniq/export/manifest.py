# SPDX-License-Identifier: Apache-2.0
"""The record of the files that omniq wrote into an exported folder; omniq removes only these files.

    .omniq-export.json   in the folder: the names of all files of a finished export, null while it is being written; and
                         the SHA-256 of each weight file
    .omniq-replaced      in a folder that omniq has moved aside to replace it by a newer export

Folders that version 0.1 wrote have no record. In these, and in a folder that is being written, a file belongs to omniq
if it has a name that an export may use.
"""

import hashlib
import json
import os
import re
import shutil
from collections.abc import Iterable, Mapping
from pathlib import Path, PurePosixPath

from omniq.storage.atomic import atomic_write

MANIFEST = ".omniq-export.json"
REPLACED = ".omniq-replaced"
_OWN = {MANIFEST, REPLACED, f".{MANIFEST}.partial"}
_WEIGHTS = (".safetensors", ".gguf")
_NAMES = re.compile(
    r"(config|generation_config)\.json|README\.md|recipe\.yaml"
    r"|model\.gguf(\.data)?|model(-\d{5}-of-\d{5})?\.safetensors|model\.safetensors\.index\.json|shard-\d{5}\.safetensors"
    r"|(tokenizer|tokenizer_config|special_tokens_map|added_tokens|vocab|chat_template|processor_config)\.json"
    r"|(merges|vocab)\.txt|(tokenizer|spiece|sentencepiece\.bpe)\.model|chat_template\.jinja"
    r"|additional_chat_templates(/[^/]+\.jinja)?"
)


def write_manifest(folder: Path, names: Iterable[str] | None, digests: Mapping[str, str] | None = None) -> None:
    """Record the files of an export by their paths in the folder; None while they are being written.

    Args:
        folder: the folder.
        names: the files.
        digests: SHA-256 of the weight files.

    Raises:
        UserError: the disk is full or the folder cannot be written.
    """
    content = {"files": None if names is None else sorted(names), "sha256": dict(digests or {})}
    atomic_write(folder / MANIFEST, (json.dumps(content, indent=1) + "\n").encode())


def recorded_names(folder: Path) -> set[str] | None:
    """The recorded files of a finished export; None without a readable record."""
    try:
        found = json.loads((folder / MANIFEST).read_bytes())["files"]
        return None if found is None else {str(name) for name in found}
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return None


def recorded_digests(folder: Path) -> dict[str, str]:
    """The recorded SHA-256 of each weight file; empty without a readable record, or with that of an older omniq."""
    try:
        found = json.loads((folder / MANIFEST).read_bytes())["sha256"]
        return {str(name): str(digest) for name, digest in found.items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return {}


def weight_digests(folder: Path, names: Iterable[str]) -> dict[str, str]:
    """SHA-256 of those files that hold weights.

    Raises:
        OSError: a file cannot be read.
    """
    digests = {}
    for name in sorted(name for name in names if name.endswith(_WEIGHTS)):
        digest = hashlib.sha256()
        with (folder / name).open("rb") as file:
            while chunk := file.read(1 << 22):
                digest.update(chunk)
        digests[name] = digest.hexdigest()
    return digests


def entries(folder: Path) -> list[str]:
    """All files, links and empty folders in a folder: the entries that its removal would delete."""
    found = []
    for root, folders, files in os.walk(folder):
        below = [name for name in folders if Path(root, name).is_symlink()]
        if not folders and not files and Path(root) != folder:
            found.append(Path(root))
        found += [Path(root, name) for name in (*below, *files)]
    return sorted(path.relative_to(folder).as_posix() for path in found)


def foreign_entries(folder: Path) -> list[str]:
    """The entries of a folder that omniq did not write, judged by the record or else by the names of an export."""
    recorded = recorded_names(folder)
    if recorded is None:
        return [name for name in entries(folder) if name not in _OWN and not _NAMES.fullmatch(name)]
    emptied = {parent.as_posix() for name in recorded for parent in PurePosixPath(name).parents}  # by a killed removal
    return sorted(set(entries(folder)) - _OWN - recorded - emptied)


def is_marked(folder: Path, mark: str) -> bool:
    """True if a folder contains omniq's mark, possibly unfinished because omniq was killed."""
    return any((folder / name).is_file() for name in (mark, f".{mark}.partial"))


def remove(folder: Path) -> None:
    """Remove a folder and its content, the marks last, so that a killed removal can be continued.

    Raises:
        OSError: the folder cannot be removed.
    """
    marks = (MANIFEST, REPLACED)
    for entry in sorted(folder.iterdir(), key=lambda entry: marks.index(entry.name) if entry.name in marks else -1):
        if entry.is_dir() and not entry.is_symlink():
            shutil.rmtree(entry)
        else:
            entry.unlink()
    folder.rmdir()
