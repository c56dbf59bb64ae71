# SPDX-License-Identifier: Apache-2.0
"""Coordinate descent (QuantEase) on the linears of one block: omniq's blocked sweep against the plain sequential one.

    python benchmarks/coordinate_descent.py                           # CUDA: LLaMA-7B shapes, 30 sweeps
    python benchmarks/coordinate_descent.py --blocks 128 256 512 --json descent.json
    python benchmarks/coordinate_descent.py --device cpu              # a SmolLM2-135M block, 12 sweeps

Weights are random, the Gram matrices those of random low-rank activations plus noise; 3 bit, per channel. First, on
small layers, the fused kernel is compared with the torch version and that with the sequential sweep: the exit status is
1 if a code differs in float64. Then, for each stack of linears with one input, in milliseconds for all sweeps:

    sequential   the published form (``plain/descent.py``) in float32; --reference sweeps are timed and scaled up
    solver       what a layer costs: prepare (triangles, norm of the weights, state) and descent (the optimizer's steps:
                 sweeps, errors, best codes; its result); ``ratio``: sequential over solver
    sweeps       the sweeps alone;  graph: the same replayed from CUDA graphs
    gemm         their products alone
    floor        the larger of 2 o i^2 flop a sweep, at the rate of a large square product of that precision (float32 on
                 CUDA: a third of float16's, see omniq/kernels/products.py), and its bytes (S, W and the grid in, D in
                 and out), at the bandwidth of a large copy; both measured in the same run

Memory: weights and Gram matrices of the whole block are there in float32. ``before_mib``, on CUDA, is allocated before
the solver starts (on an H100, cuBLAS has 32 MiB of that), ``solver_mib`` what it adds at most, in a call of its own
(``measuring/machine.py``).
"""

import argparse
import json
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from measuring.machine import Rates, Work, copy_bandwidth, name_of, peak_bytes
from plain.descent import published_sweeps
from torch import Tensor, nn

from omniq.grid.affine import Grid
from omniq.kernels.coordinate_descent import sweep_
from omniq.kernels.layer_problem import Precision, Problem, nearest, prepare
from omniq.kernels.matmul_precision import matmul_precision
from omniq.kernels.products import products_of
from omniq.solvers.coordinate_descent import CoordinateDescent, is_relaxed
from omniq.solvers.solution import LayerSolution

LAYERS = {
    "cuda": {"qkv": (12288, 4096), "o": (4096, 4096), "gate_up": (22016, 4096), "down": (4096, 11008)},
    "cpu": {"qkv": (960, 576), "o": (576, 576), "gate_up": (3072, 576), "down": (576, 1536)},
}
GRID = Grid(3)
MIB = 2**20

Layers = dict[str, tuple[Tensor, Tensor]]  # weight and Gram matrix
Figures = dict[str, dict[str, float]]


def random_gram(width: int, device: torch.device) -> Tensor:
    """Of ``2 i`` tokens with ``i / 8`` power-law factors, noise and uneven channels, float32 ``[i, i]``."""
    generator = torch.Generator(device).manual_seed(width)
    decay = torch.arange(1, width // 8 + 1, device=device) ** -0.6
    factors = torch.randn(len(decay), width, generator=generator, device=device) * decay[:, None]
    x = torch.randn(2 * width, len(decay), generator=generator, device=device) @ factors
    x += 0.35 * torch.randn(x.shape, generator=generator, device=device)
    x *= torch.exp(0.4 * torch.randn(width, generator=generator, device=device))
    with matmul_precision("float32", device):
        return x.t() @ x


def random_weight(outputs: int, width: int, device: torch.device) -> Tensor:
    """Float32 ``[o, i]``, laid out column after column, as the optimizer keeps it."""
    generator = torch.Generator(device).manual_seed(outputs)
    return 0.02 * torch.randn(width, outputs, generator=generator, device=device).t()


def fit(weight: Tensor, grid: Grid = GRID) -> tuple[Tensor, Tensor]:
    """A min-max grid."""
    return grid.fit(*grid.range(weight))


def seconds_of(work: Callable[[], Any], device: torch.device, repeat: int = 1) -> float:
    """The quickest of some calls."""
    times = []
    for _ in range(repeat):
        _wait(device)
        start = time.perf_counter()
        work()
        _wait(device)
        times.append(time.perf_counter() - start)
    return min(times)


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()


def check(device: torch.device) -> dict[str, int]:
    """Codes that differ on small layers, by comparison."""
    found = {}
    for outputs, width, size, masked in ((304, 704, -1, False), (512, 1024, 128, True)):
        weight, gram = random_weight(outputs, width, device), random_gram(width, device).double()
        gram[3] = gram[:, 3] = 0  # a dead column
        scale, zero_point = fit(weight, Grid(3, size))
        mask = random_weight(outputs, width, device) > 0.04 if masked else None
        name = f"{outputs}x{width}{' masked, groups' if masked else ''}"
        precisions: list[Any] = ["float64"] if masked else ["float64", "float32", "tf32"]  # each compiles for seconds
        for precision in precisions if device.type == "cuda" else ():
            problem = prepare(weight, gram, scale, zero_point, 3, mask=mask, precision=precision)
            torch_, fused = (_codes(problem, backend) for backend in ("torch", "triton"))
            found[f"fused and torch, {name}, {precision}"] = int((torch_ != fused).sum())
        if not masked:
            gram[3, 3] = 1.0  # alone, but no longer dead: the published form divides by it
            problem = prepare(weight, gram, scale, zero_point, 3, precision="float64")
            values = published_sweeps(weight.double(), gram, (scale, zero_point), GRID.max_code, (True, False, True))
            codes = ((values / scale).round() + zero_point).clamp(0, GRID.max_code)
            found[f"blocked and sequential, {name}, float64"] = int((_codes(problem, "auto").t() != codes).sum())
    return found


def _codes(problem: Problem, backend: Any) -> Tensor:
    residual = torch.zeros_like(problem.target)
    for rounded in (True, False, True):
        sweep_(problem, residual, rounded, backend)
    return nearest(problem, residual, slice(None)).to(torch.uint8)


def square_rate(precision: Precision, device: torch.device) -> float:
    """Flop per second of a large square product; of float32 on CUDA, as three products of float16."""
    size, parts = (8192, 3 if precision == "float32" else 1) if device.type == "cuda" else (1536, 1)
    a, b = torch.randn(2, size, size, device=device, dtype=torch.float16 if parts > 1 else None)
    out = torch.empty_like(a)
    with matmul_precision(precision, device):
        torch.mm(a, b, out=out)
        return 2 * size**3 / seconds_of(lambda: torch.mm(a, b, out=out), device, 5) / parts


def measure_sweeps(problem: Problem, kinds: Sequence[bool], rates: Rates) -> dict[str, float]:
    """Sweeps without the optimizer, and their products alone."""
    device, (width, outputs) = problem.target.device, problem.target.shape
    residual = torch.zeros_like(problem.target)
    moved = (problem.gram, problem.target, problem.scale, problem.zero_point, residual, residual)
    once = {}
    for rounded in (True, False):
        sweep_(problem, residual, rounded)  # compiles
        once[rounded] = seconds_of(lambda rounded=rounded: sweep_(problem, residual, rounded), device, 3)  # type: ignore[misc]
    figures = {
        "rounded_ms": 1e3 * once[True],
        "relaxed_ms": 1e3 * once[False],
        "sweeps_ms": 1e3 * sum(once[rounded] for rounded in kinds),
        "gemm_ms": 1e3 * products_alone(problem, residual) * len(kinds),
        "floor_ms": 1e3 * len(kinds) * rates.floor(Work(2 * outputs * width**2, sum(each.nbytes for each in moved))),
    }
    if device.type == "cuda":
        for rounded in (True, False):
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                sweep_(problem, residual, rounded)
            once[rounded] = seconds_of(graph.replay, device, 3)
        figures["graph_ms"] = 1e3 * sum(once[rounded] for rounded in kinds)
    return figures


def products_alone(problem: Problem, residual: Tensor) -> float:
    """Seconds for the products of one sweep."""
    room = residual.new_empty(problem.block, residual.shape[1])

    def products() -> None:
        made = products_of(problem, residual, fused=True)
        for columns in problem.blocks():
            made.gradient(columns, room[: columns.stop - columns.start])
            made.refresh(columns)
        made.finish()

    with matmul_precision(problem.precision, residual.device):
        products()
        return seconds_of(products, residual.device, 3)


def measure_descent(weight: Tensor, gram: Tensor, precision: Precision, block: int, sweeps: int) -> dict[str, float]:
    """The optimizer, from its making to its result; its error as it reports it, and by products."""
    made: list[CoordinateDescent] = []
    found: list[LayerSolution] = []
    grid = fit(weight)

    def make() -> None:
        parameter = nn.Parameter(weight, requires_grad=False)
        made.append(
            CoordinateDescent([parameter], gram, GRID, *grid, sweeps=sweeps, precision=precision, block=block or None)
        )

    def descend() -> None:
        for _ in range(sweeps):
            made[0].step()
        found.append(made[0].result(last=True))

    def solve() -> None:
        make()
        descend()
        del made[:], found[:]

    figures = {"before_mib": torch.cuda.memory_allocated() / MIB} if weight.is_cuda else {}
    figures["solver_mib"] = peak_bytes(solve, weight.device.type) / MIB
    figures["prepare_ms"] = 1e3 * seconds_of(make, weight.device)
    figures["descent_ms"] = 1e3 * seconds_of(descend, weight.device)
    figures["solver_ms"] = figures["prepare_ms"] + figures["descent_ms"]
    state = made[0].state[made[0].weight]
    figures["error_percent"] = 100 * float(state["best_objective"].sum() / state["baseline"].sum())
    residual = weight - GRID.dequantize(*found[0][:3])
    with matmul_precision("float32", weight.device):
        exact = (residual @ gram).mul_(residual).sum() / (weight @ gram).mul_(weight).sum()
    return figures | {"error_by_products_percent": 100 * float(exact)}


def measure_reference(weight: Tensor, gram: Tensor, kinds: Sequence[bool], sweeps: int) -> float:
    """Milliseconds of all sweeps of the sequential form in float32, from those of its first few."""
    grid = fit(weight)
    with matmul_precision("float32", weight.device):
        few = seconds_of(lambda: published_sweeps(weight, gram, grid, GRID.max_code, kinds[:sweeps]), weight.device)
    return 1e3 * few * len(kinds) / sweeps


def run(options: argparse.Namespace) -> dict[str, Any]:
    device = torch.device(options.device)
    report: dict[str, Any] = {"device": name_of(device.type), "torch": torch.__version__, "sweeps": options.sweeps}
    report["codes that differ"] = check(device)
    for name, count in report["codes that differ"].items():
        print(f"{count:8d} codes differ: {name}")
    shapes = {name: LAYERS[device.type][name] for name in options.layers or LAYERS[device.type]}
    given = {name: (random_weight(*shape, device), random_gram(shape[1], device)) for name, shape in shapes.items()}
    report["gram_and_weights_mib"] = sum(4 * tensor.numel() for pair in given.values() for tensor in pair) / MIB
    kinds = [not is_relaxed(k, options.sweeps) for k in range(options.sweeps)]
    few = report["reference_sweeps"] = min(options.reference, len(kinds))
    sequential = {name: measure_reference(*pair, kinds, few) for name, pair in given.items()} if few else {}
    print(f"sequential: {few} sweeps were timed, times {len(kinds)} / {few}" if few else "sequential: not timed")
    report["runs"], bandwidth = [], copy_bandwidth(device.type)
    for precision in options.precisions:
        rates = Rates(square_rate(precision, device), bandwidth)
        for block in options.blocks:
            layers = measure_block(given, kinds, precision, block, rates)
            for name, figures in layers.items():
                figures |= {"sequential_ms": sequential[name]} if few else {}
                _print(f"{precision} block {block} {name} {shapes[name]}", figures)
            total = whole_block(layers, report["gram_and_weights_mib"])
            _print(f"{precision} block {block} WHOLE BLOCK, {rates}", total)
            how = {"precision": precision, "block": block, "rates": vars(rates)}
            report["runs"].append(how | {"layers": layers, "total": total})
    return report


def measure_block(given: Layers, kinds: Sequence[bool], precision: Precision, block: int, rates: Rates) -> Figures:
    """All layers in one precision, with products of so many columns."""
    layers: Figures = {}
    device = next(iter(given.values()))[0].device
    measure_descent(random_weight(512, 1024, device), random_gram(1024, device), precision, block, 4)  # compiles
    for name, (weight, gram) in given.items():
        problem = prepare(weight, gram, *fit(weight), 3, precision=precision, block=block or None)
        layers[name] = measure_sweeps(problem, kinds, rates)
        del problem
        layers[name] |= measure_descent(weight, gram, precision, block, len(kinds))
    return layers


def whole_block(layers: Figures, given_mib: float) -> dict[str, float]:
    """Sums of times, the largest of what is in memory at a time, and the ratios."""
    any_ = next(iter(layers.values()))
    total = {key: sum(each[key] for each in layers.values()) for key in any_ if key.endswith("_ms")}
    total["solver_over_floor"] = total["solver_ms"] / total["floor_ms"]
    if "sequential_ms" in total:
        total["ratio"] = total["sequential_ms"] / total["solver_ms"]
    total["gram_and_weights_mib"] = given_mib
    total |= {key: max(each[key] for each in layers.values()) for key in any_ if key.endswith("_mib")}
    total["peak_over_gram_and_weights"] = 1 + total["solver_mib"] / given_mib
    return total


def _print(title: str, figures: dict[str, float]) -> None:
    print(title)
    print("   ", "  ".join(f"{key} {value:.4g}" for key, value in figures.items()), flush=True)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", choices=("cuda", "cpu"))
    parser.add_argument("--sweeps", type=int, help="default: 30 on CUDA, 12 on the CPU")
    parser.add_argument("--layers", nargs="+", help="some of qkv o gate_up down; default: all, a whole block")
    parser.add_argument("--precisions", nargs="+", help="default: float32 and, on CUDA, tf32")
    parser.add_argument("--blocks", nargs="+", type=int, default=[0], help="columns of a product; 0: chosen")
    parser.add_argument("--reference", type=int, default=3, help="sweeps of the sequential form to time; 0 for none")
    parser.add_argument("--json", type=Path, help="also write the figures here")
    options = parser.parse_args()
    options.sweeps = options.sweeps or (30 if options.device == "cuda" else 12)
    options.precisions = options.precisions or (["float32", "tf32"] if options.device == "cuda" else ["float32"])
    report = run(options)
    if options.json:
        options.json.parent.mkdir(parents=True, exist_ok=True)
        options.json.write_text(json.dumps(report, indent=1))
    return int(any(count for name, count in report["codes that differ"].items() if name.endswith("float64")))


if __name__ == "__main__":
    raise SystemExit(main())
