# SPDX-License-Identifier: Apache-2.0
"""Checks whether this machine has the packages that a runtime needs."""

import shlex
from collections.abc import Iterable
from importlib.metadata import version
from importlib.util import find_spec

from packaging.requirements import Requirement


def missing_packages(requirements: Iterable[str]) -> str | None:
    """The packages that must be installed before a runtime can open a checkpoint; None if all are installed.

    Args:
        requirements: requirements in pip's notation, such as ``compressed-tensors>=0.18``. The module of a package must
            have the name of the package.

    Returns:
        a message with the missing packages and the command that installs them.
    """
    missing = [text for text in requirements if not _is_installed(Requirement(text))]
    if not missing:
        return None
    command = f"pip install {' '.join(map(shlex.quote, missing))}"
    return f"transformers needs {', '.join(missing)} to open it, which this environment lacks ({command})"


def _is_installed(requirement: Requirement) -> bool:
    if find_spec(requirement.name.replace("-", "_")) is None:
        return False
    return not requirement.specifier or requirement.specifier.contains(version(requirement.name), prereleases=True)
