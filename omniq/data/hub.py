# SPDX-License-Identifier: Apache-2.0
"""Rows of a data set through ``datasets``, whose many errors become one line each.

``datasets`` takes ``[``, ``*``, ``?`` and ``::`` in the path of a local folder for a pattern, and needs a cache even to
read a local folder. A local folder is therefore read in streaming mode, with a temporary folder as cache, and through
temporary links if its path holds one of these characters.
"""

import logging
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from omniq.errors import UserError, one_line

_PATTERN = ("[", "]", "*", "?", "::")
_NESTED = 5000  # levels of json in one line; the parser of ``datasets`` ends the process beyond about 10,000


@contextmanager
def dataset_rows(
    path: str, name: str | None, split: str, data_files: str | None, revision: str | None, streaming: bool
) -> Iterator[Any]:
    """The rows of a split as mappings, to be read inside the context.

    Args:
        path, name, split, data_files, revision, streaming: as ``omniq.data.HubText`` takes them.

    Raises:
        UserError: the Hub cannot be reached, the data set cannot be read, or the cache cannot be written.
    """
    with _quiet_datasets() as datasets, _literal(path) as (place, cache):
        try:
            yield datasets.load_dataset(
                place,
                name,
                split=split,
                data_files={split: data_files} if data_files else None,
                revision=revision,
                streaming=streaming or cache is not None,
                cache_dir=cache,
            )
        except UserError:
            raise
        except ConnectionError as error:
            raise UserError(f"HubText.path: {path!r} {_unreachable(datasets.config.HF_HUB_OFFLINE)}") from error
        except Exception as error:  # NOTE: datasets raises many kinds, such as RuntimeError for a loading script
            raise UserError(f"HubText.path: {path!r} {_reason(error, Path(datasets.config.HF_CACHE_HOME))}") from error


@contextmanager
def _literal(path: str) -> Iterator[tuple[str, str | None]]:
    """A path that ``datasets`` takes literally, and the cache to use: None, its own, unless it is a local folder."""
    folder = Path(path)
    if not os.path.isdir(path):
        yield path, None
        return
    _check_nesting(folder, path)
    with tempfile.TemporaryDirectory() as temporary:
        cache = Path(temporary) / "cache"
        if not any(character in str(folder.absolute()) for character in _PATTERN):
            yield path, str(cache)
            return
        yield str(_mirror(folder.absolute(), Path(temporary) / folder.absolute().name)), str(cache)


def _mirror(folder: Path, place: Path) -> Path:
    """A folder of the same layout with links to the files: ``datasets`` follows links to files, not to folders."""
    place = place.with_name("".join(letter if letter.isalnum() else "_" for letter in place.name))
    for root, _, names in os.walk(folder):
        mirrored = place / Path(root).relative_to(folder)
        mirrored.mkdir()
        for name in names:
            (mirrored / name).symlink_to(Path(root, name))
    return place


def _check_nesting(folder: Path, path: str) -> None:
    """Refuse a line of json that would end the process: the parser of ``datasets`` recurses for each level."""
    for file in sorted(folder.rglob("*.json*")):
        if not file.is_file():
            continue
        with file.open("rb") as lines:
            for number, line in enumerate(lines, start=1):
                if line.count(b"[") + line.count(b"{") > _NESTED and _depth(line) > _NESTED:
                    raise UserError(
                        f"HubText.path: {path!r} cannot be read: {file.name} line {number} is nested too deeply; "
                        "remove that line"
                    )


def _depth(line: bytes) -> int:
    """The deepest level of brackets outside strings."""
    depth = deepest = 0
    inside = escaped = False
    for byte in line:
        if escaped:
            escaped = False
        elif inside:
            inside, escaped = byte != ord('"'), byte == ord("\\")
        elif byte == ord('"'):
            inside = True
        elif byte in b"[{":
            depth += 1
            deepest = max(deepest, depth)
        elif byte in b"]}":
            depth -= 1
    return deepest


def _reason(error: Exception, cache: Path) -> str:
    """The reason of the failure, and the remedy."""
    said = one_line(error)
    if said.startswith("Dataset scripts are no longer supported"):
        return (
            "has a loading script, which datasets no longer runs: set HubText.revision to refs/convert/parquet if the "
            "Hub has that branch of it, or write its text to a file and use class_path: omniq.data.LocalText"
        )
    if isinstance(error, OSError) and isinstance(error.filename, str):
        place = Path(error.filename)
        if place in (cache, *cache.parents) or cache in place.parents:
            return (
                f"cannot be read, because the cache of Hugging Face cannot be written ({said}): "
                "set HF_HOME to a folder that can be written"
            )
    return f"cannot be read: {said}"


def _unreachable(offline: bool) -> str:
    remedy = "to read a file instead, set class_path: omniq.data.LocalText and init_args: {path: FILE}"
    if not offline:
        return f"cannot be fetched: the Hugging Face Hub is unreachable; {remedy}"
    switches = ("HF_DATASETS_OFFLINE", "HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE")
    switch = next(name for name in switches if os.environ.get(name))
    return f"is not in the local cache, and {switch}={os.environ[switch]} forbids the Hub; unset it, or {remedy}"


@contextmanager
def _quiet_datasets() -> Iterator[Any]:
    """Import ``datasets`` (half a second), and silence its logs, which repeat the message of the error."""
    import datasets

    levels = {name: logging.getLogger(name).level for name in ("datasets", "huggingface_hub")}
    for name in levels:
        logging.getLogger(name).setLevel(logging.CRITICAL)
    try:
        yield datasets
    finally:
        for name, level in levels.items():
            logging.getLogger(name).setLevel(level)
