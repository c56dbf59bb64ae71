# SPDX-License-Identifier: Apache-2.0
"""Fake quantization of all linears of one block, forward and backward: fused against plain eager autograd.

    python benchmarks/fake_quant.py                          # CUDA: one LLaMA-7B block, float16
    python benchmarks/fake_quant.py --device cpu             # one SmolLM2-135M block, float32
    python benchmarks/fake_quant.py --device cpu --compile   # and what torch.compile makes of the specification
    python benchmarks/fake_quant.py --json results.json

For every scheme, with only the clipping learned (LWC) and with a factor for each row and column of the weights as under
a transform (LET):

    fused ms    the operator (on a CPU in chunks that stay in cache), in a CUDA graph on CUDA as in a training step
    calls ms    the same called one by one from Python
    eager ms    ``fake_quantize_reference``: differentiable torch, as the published code has it
    compiled ms the same by torch.compile; its making takes ``make s``, for the shapes of the block together
    floor ms    the larger of arithmetic over the rate of a float32 product, which the same units do at best, and bytes
                that must move (the weight in, the result out, the weight and the result's gradient in), over the copy
                bandwidth, both measured in the same run
    MiB         peak memory beside weights, results and their gradients, fused and eager
                (``benchmarks/measuring/machine.py``)
"""

import argparse
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from measuring.llama import SHAPES
from measuring.machine import Rates, Work, name_of, peak_bytes, seconds_of, write_json
from torch import Tensor

from omniq.grid.affine import Grid
from omniq.grid.name import parse_scheme
from omniq.kernels.fake_quant import fake_quantize, fake_quantize_reference
from omniq.kernels.scaled_weight import ScaledWeight

BLOCKS = {"cuda": ("7b", torch.float16), "cpu": ("smollm2", torch.float32)}
SCHEMES = {"cuda": ("W4A16", "W3A16g128", "W2A16g64"), "cpu": ("W4A16", "W3A16g64")}
# Operations a weight. Forward: divide, round, two bounds, multiply. Backward: the first four again, compare, multiply
# and subtract for the residual, times the gradient, add. Factors: two products each way, least and greatest, and the
# sums over rows and columns with a product each.
CLIPPING, FACTORS = 5 + 9, 2 * 2 + 2 + 4


class Linear:
    """One weight with its range, factors, logits and the gradient that comes back."""

    def __init__(self, shape: tuple[int, int], grid: Grid, dtype: torch.dtype, device: str, scaled: bool) -> None:
        self.grid = grid
        self.weight = (0.02 * torch.randn(shape, device=device)).to(dtype)
        self.factors = [torch.ones(size, device=device, requires_grad=True) for size in shape] if scaled else []
        with torch.no_grad():
            self.range = tuple(bound.float() for bound in grid.range(self.weight))
        self.upper, self.lower = (torch.full_like(self.range[0], 4.0).requires_grad_() for _ in range(2))
        self.grad = torch.randn(shape, device=device).to(dtype)

    def arguments(self) -> tuple[Any, ...]:
        """Of the operator and of its specification."""
        bounds = None if self.factors else self.range
        return ScaledWeight(self.weight, *self.factors), self.upper, self.lower, self.grid, bounds

    def fused(self) -> Tensor:
        """Through the operator."""
        return fake_quantize(*self.arguments())

    def eager(self) -> Tensor:
        """By the specification."""
        return fake_quantize_reference(*self.arguments())

    def step(self, form: Callable[["Linear"], Tensor]) -> None:
        """Forward and backward."""
        torch.autograd.grad(form(self), [self.upper, self.lower, *self.factors], self.grad)


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


def peak_mebibytes(linears: list[Linear], form: Callable[[Linear], Tensor], device: str) -> float:
    """Most memory that one linear needs beside its weight, result and gradients."""
    return max(peak_bytes(partial(each.step, form), device) - each.weight.nbytes for each in linears) / 2**20


def compiled_form() -> Callable[[Linear], Tensor]:
    """The specification by torch.compile, anew for each shape."""
    torch._dynamo.reset()

    compiled = torch.compile(fake_quantize_reference, dynamic=False)
    return lambda each: compiled(*each.arguments())


def work_of(linears: list[Linear], scaled: bool) -> Work:
    """Of forward and backward."""
    weights = sum(linear.weight.numel() for linear in linears)
    moved = 4 * sum(linear.weight.nbytes for linear in linears)
    groups = 4 * (4 + 4 + 2) * sum(linear.upper.numel() for linear in linears)  # ranges and logits twice, gradients
    factors = 4 * 3 * sum(factor.numel() for linear in linears for factor in linear.factors)  # twice, gradients
    return Work((CLIPPING + (FACTORS if scaled else 0)) * weights, moved + groups + factors)


def measure(scheme: str, scaled: bool, device: str, repeats: int, rates: Rates, compile: bool) -> dict[str, Any]:
    """One line of the table."""
    bits, _, _, group_size = parse_scheme(scheme)
    shape, dtype = BLOCKS[device]
    linears = [Linear(size, Grid(bits, group_size), dtype, device, scaled) for size in SHAPES[shape].linears]

    def whole(form: Callable[[Linear], Tensor]) -> Callable[[], None]:
        def run() -> None:
            for linear in linears:
                linear.step(form)

        return run

    def milliseconds(run: Callable[[], Any], times: int = repeats) -> float:
        return 1e3 * seconds_of(run, device, times)

    fused = whole(Linear.fused)
    calls = milliseconds(fused)
    row: dict[str, Any] = {
        "scheme": scheme,
        "learned": "LWC+LET" if scaled else "LWC",
        "fused_ms": milliseconds(in_graph(fused)) if device == "cuda" else calls,
        "calls_ms": calls,
        "eager_ms": milliseconds(whole(Linear.eager), max(3, repeats // 4)),
        "floor_ms": 1e3 * rates.floor(work_of(linears, scaled)),
        "fused_mib": peak_mebibytes(linears, Linear.fused, device),
        "eager_mib": peak_mebibytes(linears, Linear.eager, device),
    }
    if compile:
        start = time.perf_counter()
        run = whole(compiled_form())
        run()
        row["make_s"] = time.perf_counter() - start
        row["compiled_ms"] = milliseconds(in_graph(run) if device == "cuda" else run)
    return row | {"speedup": row["eager_ms"] / row["fused_ms"], "over_floor": row["fused_ms"] / row["floor_ms"]}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--repeats", type=int, default=20)
    parser.add_argument(
        "--compile", action="store_true", help="time what torch.compile makes of the specification, too"
    )
    parser.add_argument("--json", type=Path, help="write the results to this file as well")
    arguments = parser.parse_args()
    device, repeats = arguments.device, arguments.repeats
    rates = Rates.measure(device, torch.float32)
    print(f"{name_of(device)}, torch {torch.__version__}, {rates}")
    names = ["fused_ms", "calls_ms", "eager_ms", "floor_ms", "speedup", "over_floor", "fused_mib", "eager_mib"]
    names += ["compiled_ms", "make_s"] if arguments.compile else []
    print(f"{'scheme':10} {'learned':8}", *(f"{name:>11}" for name in names))
    rows = []
    for scheme in SCHEMES[device]:
        for scaled in (False, True):
            row = measure(scheme, scaled, device, repeats, rates, arguments.compile)
            rows.append(row)
            print(f"{scheme:10} {row['learned']:8}", *(f"{row[name]:11.3f}" for name in names), flush=True)
    write_json(arguments.json, device, {"rates": vars(rates), "rows": rows})


if __name__ == "__main__":
    main()
