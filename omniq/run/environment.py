# SPDX-License-Identifier: Apache-2.0
"""The versions and the machine that a run records."""

import os
import platform
from contextlib import suppress
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import torch

from omniq.distributed import collectives

VERSIONS = ("torch", "lightning", "transformers", "datasets", "compressed-tensors", "safetensors", "numpy")


def environment(device: torch.device) -> dict[str, Any]:
    """What the run happens on."""
    from omniq import __version__

    versions: dict[str, str] = {}
    for name in VERSIONS:
        with suppress(PackageNotFoundError):  # a run does not need the packages that only read its checkpoint
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
