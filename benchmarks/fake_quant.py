# SPDX-License-Identifier: Apache-2.0
"""Fake quantization of all linears of one block, forward and backward: fused against plain eager autograd.

    python benchmarks/fake_quant.py                          # CUDA: one LLaMA-7B block, float16
    python benchmarks/fake_quant.py --device cpu             # one SmolLM2-135M block, float32
    python benchmarks/fake_quant.py --json results.json

For every scheme, with only the clipping learned (LWC) and with a factor for each row and column of the weights as under
a transform (LET):

    fused ms    the operator, in a CUDA graph on CUDA (as in a training step), median of the repeats
    calls ms    the same called one by one from Python
    eager ms    ``fake_quantize_reference``: differentiable torch, as the published code has it
    floor ms    bytes that must move (the weight in, the result out, the weight and the result's gradient in), over the
                copy bandwidth measured in the same run
    MiB         peak memory beside weights, results and their gradients, fused and eager (CUDA only)
"""

import argparse
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from omniq.kernels.fake_quant import fake_quantize, fake_quantize_reference
from omniq.kernels.fake_quant_moving import fake_quantize_moving
from omniq.kernels.scaled import Scaled
from omniq.quantizers.grid import Grid, parse_scheme

LLAMA_7B = [(4096, 4096)] * 4 + [(11008, 4096)] * 2 + [(4096, 11008)]
SMOLLM2 = [(576, 576)] * 2 + [(192, 576)] * 2 + [(1536, 576)] * 2 + [(576, 1536)]
SCHEMES = {"cuda": ("W4A16", "W3A16g128", "W2A16g64"), "cpu": ("W4A16", "W3A16g64")}


class Linear:
    """One weight with its range, factors, logits and the gradient that comes back."""

    def __init__(self, shape: tuple[int, int], grid: Grid, dtype: torch.dtype, device: str, moving: bool) -> None:
        self.grid = grid
        self.weight = (0.02 * torch.randn(shape, device=device)).to(dtype)
        self.factors = [torch.ones(size, device=device, requires_grad=True) for size in shape] if moving else []
        with torch.no_grad():
            self.range = tuple(bound.float() for bound in grid.range(self.weight))
        self.upper, self.lower = (torch.full_like(self.range[0], 4.0).requires_grad_() for _ in range(2))
        self.grad = torch.randn(shape, device=device).to(dtype)

    def fused(self) -> Tensor:
        """Through the operators."""
        if self.factors:
            return fake_quantize_moving(Scaled(self.weight, *self.factors), self.upper, self.lower, self.grid)
        return fake_quantize(self.weight, *self.range, self.upper, self.lower, self.grid)

    def eager(self) -> Tensor:
        """As the specification."""
        weight = Scaled(self.weight, *self.factors).tensor()
        lo, hi = (None, None) if self.factors else self.range
        return fake_quantize_reference(weight, lo, hi, self.upper, self.lower, self.grid, self.weight.dtype)

    def step(self, form: Callable[["Linear"], Tensor]) -> None:
        """Forward and backward."""
        torch.autograd.grad(form(self), [self.upper, self.lower, *self.factors], self.grad)


def milliseconds(run: Callable[[], Any], device: str, repeats: int) -> float:
    """Median time of a call, after three to warm up."""
    times = []
    for index in range(repeats + 3):
        if device == "cuda":
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            begin.record()
            run()
            end.record()
            torch.cuda.synchronize()
            times.append(begin.elapsed_time(end))
        else:
            start = time.perf_counter()
            run()
            times.append(1e3 * (time.perf_counter() - start))
        times = times if index >= 3 else []
    return statistics.median(times)


def copy_bandwidth(device: str, repeats: int) -> float:
    """Bytes a second that a copy reads and writes."""
    source = torch.ones((256 if device == "cuda" else 16) * 2**20, dtype=torch.float32, device=device)
    target = torch.empty_like(source)
    return 2e3 * source.nbytes / milliseconds(lambda: target.copy_(source), device, repeats)


def in_graph(run: Callable[[], None]) -> Callable[[], None]:
    """The same work as one CUDA graph."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        run()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run()
    return graph.replay


def peak_mebibytes(linears: list[Linear], form: Callable[[Linear], Tensor], device: str) -> float | None:
    """Most memory that one linear needs beside its weight, result and gradients."""
    if device != "cuda":
        return None
    peaks = []
    for linear in linears:
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        linear.step(form)
        peaks.append((torch.cuda.max_memory_allocated() - before - linear.weight.nbytes) / 2**20)
    return max(peaks)


def measure(scheme: str, moving: bool, device: str, repeats: int, bandwidth: float) -> dict[str, Any]:
    """One line of the table."""
    bits, _, _, group_size = parse_scheme(scheme)
    shapes, dtype = (LLAMA_7B, torch.float16) if device == "cuda" else (SMOLLM2, torch.float32)
    linears = [Linear(shape, Grid(bits, group_size), dtype, device, moving) for shape in shapes]

    def fused() -> None:
        for linear in linears:
            linear.step(Linear.fused)

    def eager() -> None:
        for linear in linears:
            linear.step(Linear.eager)

    moved = 4 * sum(linear.weight.nbytes for linear in linears)
    groups = 4 * (4 + 4 + 2) * sum(linear.upper.numel() for linear in linears)  # ranges and logits twice, gradients
    calls = milliseconds(fused, device, repeats)
    row: dict[str, Any] = {
        "scheme": scheme,
        "learned": "LWC+LET" if moving else "LWC",
        "fused_ms": milliseconds(in_graph(fused), device, repeats) if device == "cuda" else calls,
        "calls_ms": calls,
        "eager_ms": milliseconds(eager, device, max(3, repeats // 4)),
        "floor_ms": 1e3 * (moved + groups) / bandwidth,
        "fused_mib": peak_mebibytes(linears, Linear.fused, device),
        "eager_mib": peak_mebibytes(linears, Linear.eager, device),
    }
    return row | {"speedup": row["eager_ms"] / row["fused_ms"], "over_floor": row["fused_ms"] / row["floor_ms"]}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--repeats", type=int, default=20)
    parser.add_argument("--json", type=Path, help="write the results to this file as well")
    arguments = parser.parse_args()
    device, repeats = arguments.device, arguments.repeats
    bandwidth = copy_bandwidth(device, repeats)
    name = torch.cuda.get_device_name() if device == "cuda" else f"CPU, {torch.get_num_threads()} threads"
    print(f"{name}, torch {torch.__version__}, copy bandwidth {bandwidth / 1e9:.0f} GB/s")
    print(f"{'scheme':10} {'learned':8} {'fused ms':>9} {'calls ms':>9} {'eager ms':>9} {'floor ms':>9} "
          f"{'speedup':>8} {'/ floor':>8} {'MiB':>7} {'eager':>7}")  # fmt: skip
    rows = []
    for scheme in SCHEMES[device]:
        for moving in (False, True):
            row = measure(scheme, moving, device, repeats, bandwidth)
            rows.append(row)
            figures = (f"{row[key]:9.3f}" for key in ("fused_ms", "calls_ms", "eager_ms", "floor_ms"))
            memory = (f"{row[key]:7.0f}" if row[key] is not None else "      -" for key in ("fused_mib", "eager_mib"))
            print(
                f"{scheme:10} {row['learned']:8}",
                *figures,
                f"{row['speedup']:7.1f}x {row['over_floor']:7.1f}x",
                *memory,
            )
    if arguments.json is not None:
        result = {"device": name, "torch": torch.__version__, "copy_bytes_per_second": bandwidth, "rows": rows}
        arguments.json.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
