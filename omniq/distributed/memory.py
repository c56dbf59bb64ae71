# SPDX-License-Identifier: Apache-2.0
"""How much host memory the system, or this container, still has."""

from pathlib import Path

import torch


def free_host_memory(root: Path = Path("/")) -> int:
    """What the system, or this container, can still give, in bytes; very much where neither tells.

    Args:
        root: of the filesystem with ``proc`` and ``sys``.
    """
    if torch.cuda.is_initialized() and hasattr(torch.accelerator, "empty_host_cache"):  # torch 2.11 has none
        torch.accelerator.empty_host_cache()  # freed memory that torch keeps pinned
    limits = []
    if (meminfo := root / "proc/meminfo").exists():
        fields = dict(line.split(":") for line in meminfo.read_text().splitlines())
        limits.append(1024 * int(fields["MemAvailable"].split()[0]))
    group = root / "sys/fs/cgroup"
    limit, used = group / "memory.max", group / "memory.current"
    if limit.exists() and used.exists() and limit.read_text().strip() != "max":
        parts = dict(line.split() for line in (group / "memory.stat").read_text().splitlines())
        cached = int(parts["inactive_file"])  # what was read from files makes room for what is asked for
        limits.append(int(limit.read_text()) - int(used.read_text()) + cached)
    return max(0, min(limits, default=2**62))
