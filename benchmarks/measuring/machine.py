# SPDX-License-Identifier: Apache-2.0
"""How the benchmarks measure: time, memory, and what this machine can do at best.

    floor = max( operations / rate,  bytes / bandwidth )

Operations are the floating-point ones that no arrangement of the algorithm avoids; bytes are every input read once and
every output written once, as if nothing in between touched memory. The rate is that of a large square product, the
bandwidth that of a large copy, which reads and writes; both are measured in the same run. What fits into the caches of
a CPU may beat a floor of bytes.

Peak memory of a call is what it adds at most to what is there before it:

    CUDA    bytes that torch's allocator has handed out
    CPU     the same of torch's CPU allocator, by the profiler's record of every allocation. The scratch of libraries
            (MKL, oneDNN), numpy and Python itself are not in it, and what is freed in the call but was made before it
            is not subtracted. The resident memory of the process tells less: malloc keeps what a call gives back.
"""

import json
import os
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile


@dataclass(frozen=True)
class Work:
    """What a computation cannot do without.

    Args:
        operations: floating-point operations.
        moved: bytes, each input once and each output once.
    """

    operations: float
    moved: float

    def __add__(self, other: "Work") -> "Work":
        return Work(self.operations + other.operations, self.moved + other.moved)

    def times(self, number: float) -> "Work":
        """The same so many times."""
        return Work(number * self.operations, number * self.moved)


@dataclass(frozen=True)
class Rates:
    """What a device does in a second.

    Args:
        operations: floating-point operations of a large product.
        moved: bytes that a large copy reads and writes.
    """

    operations: float
    moved: float

    @classmethod
    def measure(cls, device: str, dtype: torch.dtype) -> "Rates":
        """Both, now."""
        return cls(matrix_rate(device, dtype), copy_bandwidth(device))

    def floor(self, work: Work) -> float:
        """The least seconds that it can take."""
        return max(work.operations / self.operations, work.moved / self.moved)

    def __str__(self) -> str:
        return f"{self.operations / 1e12:.3g} TFLOP/s, copy {self.moved / 1e9:.3g} GB/s"


def name_of(device: str) -> str:
    """The device in words."""
    return torch.cuda.get_device_name() if device == "cuda" else f"CPU, {torch.get_num_threads()} threads"


def seconds_of(run: Callable[[], Any], device: str, repeats: int, warmup: int = 3) -> float:
    """Median seconds of a call, after some to warm up; on CUDA until the GPU is done with it."""
    return statistics.median(_times(run, device, repeats, warmup))


def matrix_rate(device: str, dtype: torch.dtype) -> float:
    """Floating-point operations a second of a large square product, at best."""
    size = 8192 if device == "cuda" else 1536
    a, b = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
    return 2 * size**3 / min(_times(lambda: a @ b, device, 10))


def copy_bandwidth(device: str) -> float:
    """Bytes a second that a copy of 1 GiB (256 MiB on a CPU) reads and writes, at best."""
    source = torch.ones((1024 if device == "cuda" else 256) * 2**20, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    return 2 * source.nbytes / min(_times(lambda: target.copy_(source), device, 10))


def _times(run: Callable[[], Any], device: str, repeats: int, warmup: int = 3) -> list[float]:
    times = []
    for _ in range(warmup + repeats):
        if device == "cuda":
            torch.cuda.synchronize()
        start = time.perf_counter()
        run()
        if device == "cuda":
            torch.cuda.synchronize()
        times.append(time.perf_counter() - start)
    return times[warmup:]


def peak_bytes(run: Callable[[], Any], device: str) -> int:
    """Most memory of a call beside what is there before it; see the text of this module."""
    if device == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        run()
        return torch.cuda.max_memory_allocated() - before
    with _mute(), profile(activities=[ProfilerActivity.CPU], profile_memory=True) as recorded:
        run()
    results = recorded.profiler.kineto_results
    changes = [(each.start_ns(), each.nbytes()) for each in results.events() if each.name() == "[memory]"]
    live = peak = 0
    for _, change in sorted(changes, key=lambda pair: pair[0]):
        live += change
        peak = max(peak, live)
    return peak


def write_json(path: Path | None, device: str, content: dict[str, Any]) -> None:
    """Write figures with what they were measured on; nothing without a path."""
    if path is not None:
        machine = {"device": name_of(device), "threads": torch.get_num_threads(), "torch": torch.__version__}
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(machine | content, indent=2) + "\n")


@contextmanager
def _mute() -> Iterator[None]:
    """Keep what C++ writes to standard error away: the profiler tells when it starts, and of every unknown block."""
    before, nowhere = os.dup(2), os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, 2)
    try:
        yield
    finally:
        os.dup2(before, 2)
        os.close(nowhere)
        os.close(before)
