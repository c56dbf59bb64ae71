# SPDX-License-Identifier: Apache-2.0
"""Placement of the activation streams: device memory, (pinned) host memory or memory-mapped files.

The file of a stream has no name. It occupies disk space during the run, and the kernel frees the space when the process
ends.
"""

import os
import tempfile
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

from omniq.distributed.memory import free_host_memory, free_memory
from omniq.errors import UserError

Location = Literal["device", "host", "disk"]


@dataclass(frozen=True)
class ActivationPlacement:
    """The memory that holds the streams of a run.

    Args:
        location: device memory, (pinned) host memory, or files.
        device: the device of the blocks.
        folder: the folder of the files.
        copy_on_disk: make the copy of the streams that is saved in files, although the streams are not in files.
    """

    location: Location
    device: torch.device
    folder: Path
    copy_on_disk: bool = False

    @classmethod
    def choose(
        cls,
        wanted: str,
        device: torch.device,
        folder: Path,
        size: int,
        count: int = 3,
        processes: int = 1,
        saved: int = 0,
    ) -> "ActivationPlacement":
        """Choose a placement as the user asks, or by the free memory.

        Args:
            wanted: a location, or ``auto``: GPU memory, if the streams need at most half of its free bytes; otherwise
                host memory by the same rule, for all processes of this machine together; otherwise files.
            device: the device of the blocks.
            folder: the folder of the files.
            size: bytes of one stream of this process.
            count: number of streams that exist at the same time; some stages need a third stream.
            processes: number of processes on this machine, each with ``count`` streams.
            saved: bytes of the copy that rank 0 makes of the streams of all processes.
        """
        free = free_host_memory() // 2
        on_host = processes * count * _allocated(size, device)
        if wanted == "auto":
            fits = {"device": count * size <= _free_device_memory(device), "host": on_host <= free}
            wanted = next((place for place, does in fits.items() if does), "disk")
        location: Location = "disk" if wanted == "disk" else "host" if wanted == "host" else "device"
        if location == "host" or (location == "device" and device.type == "cpu"):
            free -= on_host
        return cls(location, device, folder, location != "disk" and saved > free)

    def empty(self, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        """Allocate memory for one stream."""
        if self.location == "disk":
            return mapped_tensor(self.folder, shape, dtype)
        where = self.device if self.location == "device" else torch.device("cpu")
        pinned = self.location == "host" and self.device.type == "cuda"
        return torch.empty(shape, dtype=dtype, device=where, pin_memory=pinned)

    @property
    def copy_folder(self) -> Path | None:
        """The folder for files with the copy that is saved; None if the copy is in host memory."""
        return self.folder if self.location == "disk" or self.copy_on_disk else None

    def place(self, tensor: Tensor) -> Tensor:
        """Copy a tensor to this placement."""
        return self.empty(tuple(tensor.shape), tensor.dtype).copy_(tensor)


def empty_like_stream(stream: Tensor) -> Tensor:
    """Allocate memory for another stream of the same shape in the same placement."""
    file = stream.untyped_storage().filename
    if file is not None:
        return mapped_tensor(Path(file).parent, tuple(stream.shape), stream.dtype)
    pinned = stream.device.type == "cpu" and torch.cuda.is_initialized() and stream.is_pinned()
    return torch.empty(stream.shape, dtype=stream.dtype, device=stream.device, pin_memory=pinned)


def gather_samples(stream: Tensor, samples: Tensor | slice, device: torch.device) -> Tensor:
    """Copy samples of a stream to the device, ``[batch, t, h]``. The host does not wait for copies from pinned memory.

    Args:
        stream: the stream, ``[n, t, h]``.
        samples: a slice, or int64 indices on the host or on the device of the stream.
        device: the device of the result.
    """
    if stream.device == device:
        return stream[samples if isinstance(samples, slice) else samples.to(device)]
    if isinstance(samples, slice):
        return stream[samples].to(device, non_blocking=True)
    batch = torch.empty(len(samples), *stream.shape[1:], dtype=stream.dtype, device=device)
    for row, sample in zip(batch, samples.tolist(), strict=True):
        row.copy_(stream[sample], non_blocking=True)
    return batch


def mapped_tensor(folder: Path, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """Map a file that is unlinked at once, so that no file remains, no matter how the process ends.

    Raises:
        UserError: the disk has no room for the file.
    """
    handle, name = tempfile.mkstemp(prefix="stream.", dir=folder)
    try:
        # Without the allocation, a full disk would kill the process at a later write.
        os.posix_fallocate(handle, 0, prod(shape) * dtype.itemsize)
        return torch.from_file(name, shared=True, size=prod(shape), dtype=dtype).view(shape)
    except OSError as error:
        raise UserError(
            f"streams: no room for a file of {prod(shape) * dtype.itemsize / 2**30:.1f} GiB in {folder} "
            f"({error.strerror}): free the disk, or set streams to host or device"
        ) from error
    finally:
        os.close(handle)
        os.unlink(name)


def _free_device_memory(device: torch.device) -> int:
    """Return half of the free bytes of a GPU, or 0 on a CPU. The block, its gradients and activations need the rest."""
    return free_memory(device) // 2 if device.type == "cuda" else 0


def _allocated(size: int, device: torch.device) -> int:
    """Return the bytes of host memory that a stream occupies. torch rounds pinned memory up to a power of two."""
    return 1 << (size - 1).bit_length() if device.type == "cuda" else size
