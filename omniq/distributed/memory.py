# SPDX-License-Identifier: Apache-2.0
"""The free memory of a device, and of the system or of this container."""

from pathlib import Path

import torch


def free_memory(device: torch.device) -> int:
    """Return the free memory of a GPU in bytes; on a CPU, the free host memory."""
    if device.type != "cuda":
        return free_host_memory()
    torch.cuda.empty_cache()  # returns freed memory that torch caches
    free: int = torch.cuda.mem_get_info(device)[0]
    return free


def free_host_memory(root: Path = Path("/")) -> int:
    """Return the free memory of the system or of this container, in bytes; 2^62 if it is unknown.

    Args:
        root: root of the filesystem that holds ``proc`` and ``sys``.
    """
    if torch.cuda.is_initialized() and hasattr(torch.accelerator, "empty_host_cache"):  # torch 2.11 lacks it
        torch.accelerator.empty_host_cache()  # returns freed memory that torch keeps pinned
    limits = []
    if (meminfo := root / "proc/meminfo").exists():
        fields = dict(line.split(":") for line in meminfo.read_text().splitlines())
        limits.append(1024 * int(fields["MemAvailable"].split()[0]))
    group = root / "sys/fs/cgroup"
    limit, used = group / "memory.max", group / "memory.current"
    if limit.exists() and used.exists() and limit.read_text().strip() != "max":
        parts = dict(line.split() for line in (group / "memory.stat").read_text().splitlines())
        cached = int(parts["inactive_file"])  # the kernel drops this file cache when a process needs memory
        limits.append(int(limit.read_text()) - int(used.read_text()) + cached)
    return max(0, min(limits, default=2**62))
