# SPDX-License-Identifier: Apache-2.0
"""Where a checkpoint goes, so that a reader finds the old one or the new one, never a mixture.

    .<out>.partial/   everything is written here, flushed to the disk
    <out>             appears by a rename when all of it is there

An ``out`` that holds an earlier export is moved to ``.<out>.previous`` for the instant between two renames and removed
after. A process killed at any moment leaves the old export or the new one; what it leaves beside them is put right by
the next export to the same place. Whatever else lies there is the user's and stays.

What tells an export of omniq is not the names of its files, which other tools give theirs (llm-compressor writes a
``config.json`` and a ``recipe.yaml``, too), but what is in its card or its recipe; either may be damaged.
"""

import json
import os
import shutil
from pathlib import Path

import yaml

from omniq.errors import CorruptFile, UserError
from omniq.export.containers.card import is_card
from omniq.export.containers.shards import writing
from omniq.storage.atomic import flush

_SECTIONS = {"model", "data", "stages", "scheme"}  # there is no recipe of omniq without them


def check_free(out: str | os.PathLike[str]) -> None:
    """Refuse a place that a checkpoint cannot take; nothing is touched, so any process may ask at any time.

    Raises:
        UserError: a file is in the way, or ``out`` holds something other than an export.
    """
    out = Path(out).resolve()
    if in_the_way := next((parent for parent in out.parents if parent.is_file()), None):
        raise UserError(f"cannot write {out}: {in_the_way} is a file; choose another folder")
    if out.exists() and not _is_export(out):
        raise UserError(f"export to {out}: it holds something that omniq did not export; choose an empty or new folder")


def check_output(out: str | os.PathLike[str]) -> None:
    """Make sure that a checkpoint can be written to ``out`` now, and put right what a killed export left beside it.

    Raises:
        UserError: as ``check_free`` says, or its folder cannot be written.
    """
    out = Path(out).resolve()
    partial, previous = partial_of(out), _previous(out)
    check_free(out)
    with writing(out):
        out.parent.mkdir(parents=True, exist_ok=True)
        if previous.exists() and not out.exists():
            previous.rename(out)  # killed between the two renames: the old export is the last complete one
        for leftover in (partial, previous):
            if leftover.exists():
                shutil.rmtree(leftover)
        partial.mkdir()  # a probe: the folder can be written
        partial.rmdir()


def earlier_export(out: str | os.PathLike[str]) -> str | None:
    """The format of the export that a folder holds, by its ``config.json``; None if it holds none.

    Raises:
        CorruptFile: the file does not tell.
    """
    out = Path(out)
    if not _is_export(out) or not any(out.iterdir()):
        return None
    try:
        return str(json.loads((out / "config.json").read_text())["quantization_config"]["quant_method"])
    except (ValueError, KeyError, TypeError) as error:
        raise CorruptFile(f"{out / 'config.json'} does not tell the format") from error


def partial_of(out: Path) -> Path:
    """Where an export to ``out`` is written until it is complete; hidden, as no folder of a user's is by chance."""
    return out.with_name(f".{out.name}.partial")


def _previous(out: Path) -> Path:
    return out.with_name(f".{out.name}.previous")


def _is_export(out: Path) -> bool:
    """An empty folder, or one that an export of omniq has filled."""
    if not out.is_dir():
        return False
    if not any(out.iterdir()):
        return True
    own = is_card(_text(out / "README.md")) or _is_recipe(_text(out / "recipe.yaml"))
    return own and (out / "config.json").is_file()


def _is_recipe(text: str) -> bool:
    """Whether it has the sections of a run of omniq."""
    try:
        recipe = yaml.safe_load(text)
    except (yaml.YAMLError, ValueError):  # the latter for a date that there is not
        return False
    return isinstance(recipe, dict) and recipe.keys() >= _SECTIONS


def _text(file: Path) -> str:
    """What can be read of a file that may be missing or damaged."""
    return file.read_text(errors="replace") if file.is_file() else ""


def replace(partial: Path, out: Path) -> None:
    """Flush everything, then put ``partial`` in the place of ``out``."""
    previous = _previous(out)
    with writing(out):
        for path in [*partial.rglob("*"), partial]:
            flush(path)
        if out.exists():
            out.rename(previous)
        partial.rename(out)
        flush(out.parent)
        if previous.exists():
            shutil.rmtree(previous)
