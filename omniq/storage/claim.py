# SPDX-License-Identifier: Apache-2.0
"""The fingerprint file of a run directory. It identifies the run and decides whether a command may continue it."""

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from omniq.errors import UserError
from omniq.storage.atomic import atomic_write
from omniq.storage.ownership import FINGERPRINT

_SEALED = {"run directory": 2}  # version 2: every sealed file names its run and its path in it


def claim(path: Path, fingerprint: Mapping[str, Any], config: str) -> bool:
    """Start a run in a folder, or check that the existing run in the folder is the same.

    Args:
        path: the run directory.
        fingerprint: flat mapping of all settings and digests that determine the result.
        config: the resolved configuration as YAML.

    Returns:
        True if the command continues an existing run.

    Raises:
        UserError: the folder holds a run with other settings; names each key with both values.
    """
    file = path / FINGERPRINT
    wanted, resumed = json.loads(json.dumps(fingerprint)), file.exists()
    if resumed:
        _compare(path, read_fingerprint(path), wanted)
    else:
        atomic_write(file, json.dumps({**wanted, **_SEALED}, indent=1).encode())
    atomic_write(path / "config.yaml", config.encode())  # records the latest values of settings that may change
    return resumed


def read_fingerprint(path: Path) -> dict[str, Any]:
    """Read the settings and digests that determine the result of the run in a folder.

    Raises:
        UserError: the file is missing or damaged.
    """
    return {key: value for key, value in _read(path).items() if key not in _SEALED}


def identity(path: Path) -> tuple[str, bool]:
    """Return a digest of the fingerprint of a run, and whether all its sealed files carry that digest.

    Runs of omniq 0.1 wrote files without the digest. The digest of a folder without a fingerprint is empty.
    """
    if not (path / FINGERPRINT).exists():
        return "", False
    content = _read(path)
    digest = hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()
    return digest, _SEALED.items() <= content.items()


def _read(path: Path) -> dict[str, Any]:
    file = path / FINGERPRINT
    try:
        return {**json.loads(file.read_bytes())}
    except (OSError, ValueError, TypeError, RecursionError) as error:  # TypeError if the content is not a mapping
        raise UserError(f"{file} is damaged ({error}): remove {path} to start over") from error


def _compare(path: Path, found: Mapping[str, Any], wanted: Mapping[str, Any]) -> None:
    changed = [
        f"{key} (was {found.get(key)!r}, now {wanted.get(key)!r})"
        for key in sorted(found.keys() | wanted.keys())
        if found.get(key) != wanted.get(key)
    ]
    if changed:
        raise UserError(
            f"out {path} holds a run with other settings: {'; '.join(changed)}. "
            "Give this run another out, or remove that folder"
        )
