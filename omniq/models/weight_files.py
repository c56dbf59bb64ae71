# SPDX-License-Identifier: Apache-2.0
"""Which files of a model folder hold its weights.

The rule is that of ``from_pretrained`` (transformers 5.23, ``_get_resolved_checkpoint_files``):

1. the file that ``config.json`` names as ``transformers_weights``, a safetensors file or an index;
2. ``model.safetensors``;
3. ``model.safetensors.index.json`` and the shards that it names.

omniq also opens a folder whose only weights are one GGUF file, or one safetensors file with another name.

Deviations, all of them refusals:

- ``model.safetensors`` beside an index whose shards exist: transformers reads the former, other readers the latter.
- A file outside the model's folder: an index or a config of unknown origin must not choose what is read from this
  machine. Links from a snapshot of the Hugging Face cache into the blobs of the same repository are followed.
- Pickle files.
"""

import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from omniq.errors import UserError
from omniq.models.locate import PICKLE, pickle_refusal

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
_INDEX_SUFFIX = ".safetensors.index.json"


def weight_file(folder: Path, named: str | None = None) -> str:
    """The name of the weight file in a folder: a safetensors file, an index of several, or a GGUF file.

    Args:
        folder: of the model.
        named: the file that the user named, if any.

    Raises:
        UserError: no file, only pickle files, or several files to choose from.
    """
    if named is not None and named.endswith(".gguf"):
        return named
    configured = configured_file(folder)
    if configured is not None and named not in (None, configured):
        raise UserError(
            f"model.path names {named}, but transformers_weights in {folder / 'config.json'} names {configured}: "
            "remove that key, or give the path of the folder"
        )
    if chosen := named or configured:
        return chosen
    if (folder / SINGLE).is_file():
        _refuse_second_model(folder)
        return SINGLE
    return INDEX if (folder / INDEX).is_file() else _only_file(folder)


def configured_file(folder: Path) -> str | None:
    """The weight file that ``config.json`` names as ``transformers_weights``; None if it names no file.

    Raises:
        UserError: the value is not the name of a safetensors file or index inside the folder.
    """
    config = folder / "config.json"
    name = read_json(config).get("transformers_weights") if config.is_file() else None
    if name is None:
        return None
    if Path(str(name)).suffix in PICKLE:
        raise UserError(pickle_refusal(folder / str(name)))
    if not isinstance(name, str) or not name.endswith((".safetensors", _INDEX_SUFFIX)):
        raise UserError(
            f"{config}: transformers_weights {name!r} is not the name of a safetensors file or index: remove that key"
        )
    file_inside(folder, name, config)
    return name


def weight_map(folder: Path, index: str) -> dict[str, Path]:
    """The shard of every tensor that an index lists; empty for a file that is not an index.

    Raises:
        UserError: the index is damaged, or it names a file outside the folder.
    """
    if not index.endswith(_INDEX_SUFFIX):
        return {}
    names = read_json(folder / index).get("weight_map")
    if not isinstance(names, dict) or not names or not all(isinstance(name, str) for name in names.values()):
        raise UserError(f"{folder / index} has no weight_map of file names: get the file again")
    shards = {name: file_inside(folder, name, folder / index) for name in sorted(set(names.values()))}
    return {tensor: shards[name] for tensor, name in names.items()}


def file_inside(folder: Path, name: str, named_by: Path) -> Path:
    """The path of a file that another file names, if it lies inside the folder, links followed.

    Raises:
        UserError: it lies elsewhere.
    """
    try:
        inside = Path(os.path.abspath(folder / name)).is_relative_to(os.path.abspath(folder))
        real, root = (folder / name).resolve(), folder.resolve()
        inside = inside and (real.is_relative_to(root) or real.parent in _blobs(root))
    except (OSError, RuntimeError, ValueError):  # a loop of links, or a name that no file can have
        inside = False
    if not inside:
        raise UserError(
            f"{named_by} names the weight file {name!r}, which is not inside {folder}: get {named_by.name} again, or "
            "copy the file into the folder"
        )
    return folder / name


def read_json(file: Path) -> dict[str, Any]:
    """A JSON file that must exist and must hold an object.

    Raises:
        UserError: names the file.
    """
    try:
        content = json.loads(file.read_bytes())
    except OSError as error:
        raise UserError(f"{file} cannot be read ({error.strerror}): a model folder needs it") from error
    except (ValueError, RecursionError) as error:
        raise UserError(f"{file} is not valid JSON ({error}): get the file again") from error
    if not isinstance(content, dict):
        raise UserError(f"{file} does not hold a JSON object: get the file again")
    return content


def _blobs(root: Path) -> Iterator[Path]:
    """Where the Hugging Face cache keeps the content of a snapshot: ``snapshots/REVISION/FILE -> ../../blobs/HASH``."""
    return (place.parent.parent / "blobs" for place in (root, *root.parents) if place.parent.name == "snapshots")


def _refuse_second_model(folder: Path) -> None:
    """Refuse an index beside ``model.safetensors`` if shards that it names exist."""
    shards = weight_map(folder, INDEX).values() if (folder / INDEX).is_file() else ()
    present = sorted({file.name for file in shards if file.name != SINGLE and file.exists()})
    if present:
        raise UserError(
            f"{folder} holds two models, {SINGLE} and {INDEX} with {len(present)} of its shards, such as {present[0]}: "
            f"set model.path to {folder / SINGLE} for the first, or move {SINGLE} away for the second"
        )


def _only_file(folder: Path) -> str:
    """The only GGUF file or safetensors file of a folder without the usual names."""
    files = sorted(file for file in folder.iterdir() if file.is_file())
    tensors = [file.name for file in files if file.suffix == ".safetensors"]
    ggufs = [file.name for file in files if file.suffix == ".gguf"]
    if len(tensors) > 1:
        raise UserError(f"{folder} holds several safetensors files and no {INDEX}: add the index, or name one file")
    if not tensors and len(ggufs) > 1:
        raise UserError(f"{folder} holds several GGUF files: set model.gguf_file to one of {', '.join(ggufs)}")
    if tensors or ggufs:
        return (tensors or ggufs)[0]
    for file in files:
        if file.suffix in PICKLE:
            raise UserError(pickle_refusal(file))
    raise UserError(f"{folder} holds no weights: it needs {SINGLE}, {INDEX} with its shards, or a GGUF file")
