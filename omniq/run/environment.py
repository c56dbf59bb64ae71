# SPDX-License-Identifier: Apache-2.0
"""The software versions and the machine that a run records."""

import os
import platform
from contextlib import suppress
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import torch

from omniq.distributed import collectives

VERSIONS = ("torch", "lightning", "transformers", "datasets", "compressed-tensors", "safetensors", "numpy")


def environment(device: torch.device) -> dict[str, Any]:
    """Return the versions of omniq and its dependencies, and a description of the machine."""
    from omniq import __version__

    versions: dict[str, str] = {}
    for name in VERSIONS:
        with suppress(PackageNotFoundError):  # packages that only read the checkpoint are optional
            versions[name] = version(name)
    gpu = torch.cuda.get_device_name(device) if device.type == "cuda" else None
    return {
        "omniq": __version__,
        "python": platform.python_version(),
        **versions,
        "machine": platform.machine(),
        "cores": os.cpu_count(),
        "device": gpu or "cpu",
        "processes": collectives.world_size(),
    }
