# SPDX-License-Identifier: Apache-2.0
"""The two activation streams: what the full-precision model feeds a block, and what the quantized one really does.

Where they live is the user's choice: in device memory; in host memory, pinned where there is a GPU, so that batches
come without the host waiting; or in memory-mapped files of the run directory, for more samples than memory holds. Such
a file has no name: it takes disk space while the run works and is gone with it. The copy that is written to the run
directory beside the calibration lies in host memory too, or in such files where that has no room for it.

Shapes: ``n`` samples (of this process, if there are several), ``t`` tokens of a sample, ``h`` hidden size.
"""

import os
import tempfile
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from omniq import processes
from omniq.errors import UserError

Precision = Callable[[], AbstractContextManager[Any]]
Place = Literal["device", "host", "disk"]


@dataclass(frozen=True)
class Home:
    """Where the streams of a run live.

    Args:
        place: device memory, (pinned) host memory, or files.
        device: of the blocks.
        folder: for the files.
        copy_on_disk: whether a copy that is to be saved is made in files, though the streams are not there.
    """

    place: Place
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
    ) -> "Home":
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
        place: Place = "disk" if wanted == "disk" else "host" if wanted == "host" else "device"
        if place == "host" or (place == "device" and device.type == "cpu"):
            free -= here
        return cls(place, device, folder, place != "disk" and saved > free)

    def empty(self, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        """Room for one stream."""
        if self.place == "disk":
            return _mapped(self.folder, shape, dtype)
        where = self.device if self.place == "device" else torch.device("cpu")
        pinned = self.place == "host" and self.device.type == "cuda"
        return torch.empty(shape, dtype=dtype, device=where, pin_memory=pinned)

    @property
    def copies(self) -> Path | None:
        """The folder for files of a copy that is to be saved; None for host memory."""
        return self.folder if self.place == "disk" or self.copy_on_disk else None

    def take_in(self, tensor: Tensor) -> Tensor:
        """A copy that lives here."""
        return self.empty(tuple(tensor.shape), tensor.dtype).copy_(tensor)


@dataclass
class Streams:
    """Activations of every sample at a block boundary.

    Args:
        index: the block they enter.
        full_precision, quantized: ``[n, t, h]`` each; the last samples may be held out from training.
    """

    index: int
    full_precision: Tensor
    quantized: Tensor

    @classmethod
    def start(cls, hidden: Tensor) -> "Streams":
        """At block 0 both are the embedding."""
        return cls(0, hidden, like(hidden).copy_(hidden))

    def snapshot(self, folder: Path | None = None) -> "Streams | None":
        """Both streams as they are now, with the samples of all processes in order, for the first of them to write.

        None for the other processes.

        Args:
            folder: for files that the copy is made in; it is made in host memory if not given.
        """
        parts = [_gathered(stream, folder) for stream in (self.full_precision, self.quantized)]
        return Streams(self.index, *parts) if processes.rank() == 0 else None


def like(stream: Tensor) -> Tensor:
    """Room for another stream of the same size in the same place."""
    file = stream.untyped_storage().filename
    if file is not None:
        return _mapped(Path(file).parent, tuple(stream.shape), stream.dtype)
    pinned = stream.device.type == "cpu" and torch.cuda.is_initialized() and stream.is_pinned()
    return torch.empty(stream.shape, dtype=stream.dtype, device=stream.device, pin_memory=pinned)


def take(stream: Tensor, samples: Tensor | slice, device: torch.device) -> Tensor:
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


def call_block(block: nn.Module, hidden: Tensor, kwargs: Mapping[str, Any]) -> Tensor:
    """One forward of a block, ``[n, t, h]`` to ``[n, t, h]``."""
    output = block(hidden, **kwargs)
    return output[0] if isinstance(output, tuple) else output  # some families return (hidden states, …)


def sweep(
    block: nn.Module,
    stream: Tensor,
    kwargs: Mapping[str, Any],
    precision: Precision,
    batch: int = 4,
    use: Callable[[slice, Tensor], Any] = lambda samples, output: None,
) -> None:
    """Send a stream through a block, in batches, without gradients.

    Args:
        precision: enters the autocast context of the run, so that propagation and calibration compute alike.
        batch: samples at once.
        use: called with each batch's place in the stream and the block's output, ``[batch, t, h]``.
    """
    device = next(block.parameters()).device
    with torch.no_grad(), precision():
        for start in range(0, len(stream), batch):
            samples = slice(start, start + batch)
            use(samples, call_block(block, take(stream, samples, device), kwargs))


def propagate(
    block: nn.Module, stream: Tensor, kwargs: Mapping[str, Any], precision: Precision, batch: int = 4
) -> bool:
    """Replace a stream, ``[n, t, h]``, by what the block makes of it: in place, as ``sweep`` goes along.

    Returns:
        whether all of it is finite, which the block's device tells faster than the host would.
    """
    device = next(block.parameters()).device
    finite = torch.ones((), dtype=torch.bool, device=device)

    def store(samples: slice, output: Tensor) -> None:
        torch.logical_and(finite, output.isfinite().all(), out=finite)
        stream[samples].copy_(output, non_blocking=True)

    sweep(block, stream, kwargs, precision, batch, store)
    if stream.device != device and device.type == "cuda":
        torch.cuda.synchronize(device)  # the last batches may still be on their way to the host
    return bool(finite)


def _gathered(stream: Tensor, folder: Path | None, batch: int = 4) -> Tensor:
    number = processes.count()
    shape = (number * len(stream), *stream.shape[1:])
    if processes.rank() != 0:
        whole = stream.new_empty(0)
    elif folder is not None:
        whole = _mapped(folder, shape, stream.dtype)
    else:
        whole = torch.empty(shape, dtype=stream.dtype)
    for start in range(0, len(stream), batch):
        part = processes.gather_samples(stream[start : start + batch])
        if len(whole):
            whole[number * start : number * start + len(part)].copy_(part)
    return whole


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


def _allocated(size: int, device: torch.device) -> int:
    """Bytes of host memory that a stream takes: torch pins the next power of two."""
    return 1 << (size - 1).bit_length() if device.type == "cuda" else size
