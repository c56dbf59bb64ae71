# SPDX-License-Identifier: Apache-2.0
"""Where the activation streams live: device memory, (pinned) host memory or memory-mapped files.

A file of a stream has no name: it takes disk space while the run works and is gone with it.
"""

import os
import tempfile
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

from omniq.distributed.memory import free_host_memory
from omniq.errors import UserError

Location = Literal["device", "host", "disk"]


@dataclass(frozen=True)
class ActivationPlacement:
    """Where the streams of a run live.

    Args:
        location: device memory, (pinned) host memory, or files.
        device: of the blocks.
        folder: for the files.
        copy_on_disk: whether a copy that is to be saved is made in files, though the streams are not there.
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
        neighbours: int = 1,
        saved: int = 0,
    ) -> "ActivationPlacement":
        """A home as the user wants it, or by what is free.

        Args:
            wanted: a place, or ``auto``: the memory of the GPU, if the streams take no more than half of what is free
                there; then host memory by the same rule, for all processes of this machine together; then files.
            size: bytes of a stream of this process.
            count: streams that are alive at once; some stages need a third.
            neighbours: processes on this machine, this one included, each with as many streams.
            saved: bytes of the copy that the first process makes of the streams of all.
        """
        free = free_host_memory() // 2
        here = neighbours * count * _allocated(size, device)
        if wanted == "auto":
            fits = {"device": count * size <= _free_device_memory(device), "host": here <= free}
            wanted = next((place for place, does in fits.items() if does), "disk")
        location: Location = "disk" if wanted == "disk" else "host" if wanted == "host" else "device"
        if location == "host" or (location == "device" and device.type == "cpu"):
            free -= here
        return cls(location, device, folder, location != "disk" and saved > free)

    def empty(self, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        """Room for one stream."""
        if self.location == "disk":
            return _mapped(self.folder, shape, dtype)
        where = self.device if self.location == "device" else torch.device("cpu")
        pinned = self.location == "host" and self.device.type == "cuda"
        return torch.empty(shape, dtype=dtype, device=where, pin_memory=pinned)

    @property
    def copies(self) -> Path | None:
        """The folder for files of a copy that is to be saved; None for host memory."""
        return self.folder if self.location == "disk" or self.copy_on_disk else None

    def place(self, tensor: Tensor) -> Tensor:
        """A copy that lives here."""
        return self.empty(tuple(tensor.shape), tensor.dtype).copy_(tensor)


def empty_like_stream(stream: Tensor) -> Tensor:
    """Room for another stream of the same size in the same place."""
    file = stream.untyped_storage().filename
    if file is not None:
        return _mapped(Path(file).parent, tuple(stream.shape), stream.dtype)
    pinned = stream.device.type == "cpu" and torch.cuda.is_initialized() and stream.is_pinned()
    return torch.empty(stream.shape, dtype=stream.dtype, device=stream.device, pin_memory=pinned)


def gather_samples(stream: Tensor, samples: Tensor | slice, device: torch.device) -> Tensor:
    """Some samples of a stream on the device, ``[batch, t, h]``; from pinned memory the host does not wait for them.

    Args:
        samples: int64 indices on the host or where the stream is, or a slice.
    """
    if stream.device == device:
        return stream[samples if isinstance(samples, slice) else samples.to(device)]
    if isinstance(samples, slice):
        return stream[samples].to(device, non_blocking=True)
    batch = torch.empty(len(samples), *stream.shape[1:], dtype=stream.dtype, device=device)
    for row, sample in zip(batch, samples.tolist(), strict=True):
        row.copy_(stream[sample], non_blocking=True)
    return batch


def _mapped(folder: Path, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """Memory of a file that loses its name at once, so that nothing is left of it however the process ends."""
    handle, name = tempfile.mkstemp(prefix="stream.", dir=folder)
    try:
        os.posix_fallocate(handle, 0, prod(shape) * dtype.itemsize)  # or a full disk would kill us at some later write
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
    """Half of what is free on a GPU; the rest is for the block, its gradients and activations. On a CPU: none."""
    if device.type != "cuda":
        return 0
    torch.cuda.empty_cache()  # freed memory that torch keeps
    return torch.cuda.mem_get_info(device)[0] // 2


def _allocated(size: int, device: torch.device) -> int:
    """Bytes of host memory that a stream takes: torch pins the next power of two."""
    return 1 << (size - 1).bit_length() if device.type == "cuda" else size
