# SPDX-License-Identifier: Apache-2.0
"""Coordinate descent (QuantEase) on the linears of one block: omniq's blocked sweep against the plain sequential one.

    python benchmarks/coordinate_descent.py                           # CUDA: LLaMA-7B shapes, 30 sweeps
    python benchmarks/coordinate_descent.py --blocks 128 256 512 --json descent.json
    python benchmarks/coordinate_descent.py --device cpu              # a SmolLM2-135M block, 12 sweeps

Weights are random, the Gram matrices those of random low-rank activations plus noise; 3 bit, per channel. First, on
small layers, the fused kernel is compared with the torch version and that with the sequential sweep: the exit status is
1 if a code differs in float64. Then, for the stacked linears of each shared input, in milliseconds for all sweeps:

    prepare      triangles, norm of the weights, state
    descent      the optimizer's steps: sweeps, errors, best codes
    sweeps       the sweeps alone;  graph: the same replayed from CUDA graphs
    GEMM         the products alone, and the share of the rate of a large square product that they reach
    floor        2 o i^2 flop a sweep over that rate
    sequential   the published form (P - P^ by one product, then a matrix-vector product a column, no host waits), as
                 many sweeps as --reference says, rounded, relaxed, rounded, ...; ``ratio`` to ours over the same sweeps
"""

import argparse
import json
import time
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from omniq.kernels.coordinate_descent import sweep_
from omniq.kernels.layer_problem import Precision, Problem, codes_of, matmul_precision, prepare
from omniq.quantizers.grid import Grid
from omniq.stages.coordinate_descent import CoordinateDescent, is_relaxed

LAYERS = {
    "cuda": {"qkv": (12288, 4096), "o": (4096, 4096), "gate_up": (22016, 4096), "down": (4096, 11008)},
    "cpu": {"qkv": (960, 576), "o": (576, 576), "gate_up": (3072, 576), "down": (576, 1536)},
}
GRID = Grid(3)
MIB = 2**20


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


def published_sweeps(weight: Tensor, gram: Tensor, scale: Tensor, zero_point: Tensor, kinds: Iterable[bool]) -> Tensor:
    """The published form, a column at a time, one group a row; rounded where ``kinds`` says so: ``W^``, ``[o, i]``."""
    scale, zero_point = scale[:, 0].to(gram), zero_point[:, 0].to(gram)
    normalized = gram / gram.diagonal()
    products = weight @ normalized
    normalized.fill_diagonal_(0)
    values = weight.clone()
    for rounded in kinds:
        estimate, moved = values @ normalized, values.clone()
        for j in range(weight.shape[1]):
            beta = products[:, j] - estimate[:, j] + moved[:, :j] @ normalized[:j, j]
            if rounded:
                beta = (((beta / scale).round() + zero_point).clamp(0, GRID.levels) - zero_point) * scale
            values[:, j] = beta
            moved[:, j] -= beta
    return values


def check(device: torch.device) -> dict[str, int]:
    """Codes that differ on small layers, by comparison."""
    found = {}
    for outputs, width, size, masked in ((300, 700, -1, False), (512, 1024, 128, True)):
        weight, gram = random_weight(outputs, width, device), random_gram(width, device).double()
        gram[3] = gram[:, 3] = 0  # a dead column
        scale, zero_point = fit(weight, Grid(3, size))
        mask = random_weight(outputs, width, device) > 0.04 if masked else None
        name = f"{outputs}x{width}{' masked, groups' if masked else ''}"
        precisions: list[Any] = ["float64", "float32", "tf32"] if device.type == "cuda" else []
        for precision in precisions:
            problem = prepare(weight, gram, scale, zero_point, 3, mask=mask, precision=precision)
            torch_, fused = (_codes(problem, backend) for backend in ("torch", "triton"))
            found[f"fused and torch, {name}, {precision}"] = int((torch_ != fused).sum())
        if not masked:
            gram[3, 3] = 1.0  # alone, but no longer dead: the published form divides by it
            problem = prepare(weight, gram, scale, zero_point, 3, precision="float64")
            values = published_sweeps(weight.double(), gram, scale, zero_point, (True, False, True))
            codes = ((values / scale).round() + zero_point).clamp(0, GRID.levels)
            found[f"blocked and sequential, {name}, float64"] = int((_codes(problem, "auto").t() != codes).sum())
    return found


def _codes(problem: Problem, backend: Any) -> Tensor:
    residual = torch.zeros_like(problem.target)
    for rounded in (True, False, True):
        sweep_(problem, residual, rounded, backend)
    return codes_of(problem, residual)


def square_rate(precision: Precision, device: torch.device) -> float:
    """Flop per second of a large square product."""
    size = 8192 if device.type == "cuda" else 1536
    a, b = torch.randn(2, size, size, device=device)
    with matmul_precision(precision, device):
        torch.mm(a, b)
        return 2 * size**3 / seconds_of(lambda: torch.mm(a, b), device, 5)


def measure_sweeps(problem: Problem, kinds: Sequence[bool], rate: float) -> dict[str, float]:
    """Sweeps without the optimizer, and their products alone."""
    device, (width, outputs) = problem.target.device, problem.target.shape
    residual = torch.zeros_like(problem.target)
    once = {}
    for rounded in (True, False):
        sweep_(problem, residual, rounded)  # compiles
        once[rounded] = seconds_of(lambda rounded=rounded: sweep_(problem, residual, rounded), device, 3)  # type: ignore[misc]
    room = residual.new_empty(problem.block, outputs)

    def products() -> None:
        for columns in problem.blocks():
            torch.mm(problem.gram[columns], residual, out=room[: columns.stop - columns.start])

    with matmul_precision(problem.precision, device):
        products()
        gemm = seconds_of(products, device, 3)
    figures = {
        "rounded_ms": 1e3 * once[True],
        "relaxed_ms": 1e3 * once[False],
        "sweeps_ms": 1e3 * sum(once[rounded] for rounded in kinds),
        "gemm_ms": 1e3 * gemm * len(kinds),
        "gemm_share": 2 * outputs * width**2 / gemm / rate,
        "floor_ms": 1e3 * 2 * outputs * width**2 * len(kinds) / rate,
    }
    if device.type == "cuda":
        for rounded in (True, False):
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                sweep_(problem, residual, rounded)
            once[rounded] = seconds_of(graph.replay, device, 3)
        figures["graph_ms"] = 1e3 * sum(once[rounded] for rounded in kinds)
    return figures


def measure_descent(weight: Tensor, gram: Tensor, precision: Precision, block: int, sweeps: int) -> dict[str, float]:
    """The optimizer, from its making to its result."""
    made: list[CoordinateDescent] = []
    grid = fit(weight)

    def make() -> None:
        parameter = nn.Parameter(weight, requires_grad=False)
        made.append(CoordinateDescent([parameter], gram, GRID, *grid, sweeps=sweeps, precision=precision, block=block))

    def descend() -> None:
        for _ in range(sweeps):
            made[0].step()
        made[0].result()

    if weight.is_cuda:
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    figures = {
        "prepare_ms": 1e3 * seconds_of(make, weight.device),
        "descent_ms": 1e3 * seconds_of(descend, weight.device),
    }
    if weight.is_cuda:
        figures["peak_mib"] = torch.cuda.max_memory_allocated() / MIB
    figures["error_percent"] = 100 * float(made[0].relative_error())
    residual = weight - made[0].iterate()
    with matmul_precision("float32", weight.device):
        exact = (residual @ gram).mul_(residual).sum() / (weight @ gram).mul_(weight).sum()
    figures["error_by_products_percent"] = 100 * float(exact)
    return figures


def measure_reference(weight: Tensor, gram: Tensor, block: int, sweeps: int) -> dict[str, float]:
    """The sequential sweep, and ours in float32 over the same sweeps."""
    kinds = [k % 3 != 1 for k in range(sweeps)]
    scale, zero_point = fit(weight)
    with matmul_precision("float32", weight.device):
        slow = seconds_of(lambda: published_sweeps(weight, gram, scale, zero_point, kinds), weight.device)
    problem = prepare(weight, gram, scale, zero_point, 3, block=block)
    residual = torch.zeros_like(problem.target)
    quick = seconds_of(lambda: [sweep_(problem, residual, rounded) for rounded in kinds], weight.device)
    return {"sequential_ms": 1e3 * slow, "ours_ms": 1e3 * quick, "ratio": slow / quick}


def run(options: argparse.Namespace) -> dict[str, Any]:
    device = torch.device(options.device)
    report: dict[str, Any] = {"device": _name(device), "torch": torch.__version__, "sweeps": options.sweeps}
    report["codes that differ"] = check(device)
    for name, count in report["codes that differ"].items():
        print(f"{count:8d} codes differ: {name}")
    shapes = {name: LAYERS[device.type][name] for name in options.layers or LAYERS[device.type]}
    weights = {name: random_weight(*shape, device) for name, shape in shapes.items()}
    grams = {name: random_gram(shape[1], device) for name, shape in shapes.items()}
    resident = sum(4 * tensor.numel() for each in (weights, grams) for tensor in each.values()) / MIB
    report["gram_and_weights_mib"] = resident
    kinds = [not is_relaxed(k, options.sweeps) for k in range(options.sweeps)]
    report["runs"] = []
    for precision in options.precisions:
        rate = square_rate(precision, device)
        for block in options.blocks:
            layers = {}
            for name, weight in weights.items():
                problem = prepare(weight, grams[name], *fit(weight), 3, precision=precision, block=block)
                layers[name] = measure_sweeps(problem, kinds, rate)
                del problem
                layers[name] |= measure_descent(weight, grams[name], precision, block, options.sweeps)
                _print(f"{precision} block {block} {name} {tuple(weight.shape)}", layers[name])
            total = {key: sum(each[key] for each in layers.values()) for key in layers[name] if key.endswith("_ms")}
            if device.type == "cuda":
                total["peak_mib"] = max(each["peak_mib"] for each in layers.values())
                total["peak_over_gram_and_weights"] = total["peak_mib"] / resident
            total["solver_over_floor"] = (total["prepare_ms"] + total["descent_ms"]) / total["floor_ms"]
            _print(f"{precision} block {block} WHOLE BLOCK, {rate / 1e12:.1f} TFLOP/s", total)
            report["runs"].append(
                {"precision": precision, "block": block, "rate": rate, "layers": layers, "total": total}
            )
    if options.reference:
        pairs = {
            name: measure_reference(w, grams[name], options.blocks[0], options.reference) for name, w in weights.items()
        }
        total = {key: sum(pair[key] for pair in pairs.values()) for key in ("sequential_ms", "ours_ms")}
        total["ratio"] = total["sequential_ms"] / total["ours_ms"]
        report["reference"] = {"sweeps": options.reference, "layers": pairs, "total": total}
        for name, pair in (*pairs.items(), ("WHOLE BLOCK", total)):
            _print(f"sequential, {options.reference} sweeps, {name}", pair)
    return report


def _name(device: torch.device) -> str:
    return torch.cuda.get_device_name() if device.type == "cuda" else f"cpu, {torch.get_num_threads()} threads"


def _print(title: str, figures: dict[str, float]) -> None:
    print(title)
    print("   ", "  ".join(f"{key} {value:.4g}" for key, value in figures.items()), flush=True)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", choices=("cuda", "cpu"))
    parser.add_argument("--sweeps", type=int, help="default: 30 on CUDA, 12 on the CPU")
    parser.add_argument("--layers", nargs="+", help="some of qkv o gate_up down; default: all, a whole block")
    parser.add_argument("--precisions", nargs="+", help="default: float32 and, on CUDA, tf32")
    parser.add_argument("--blocks", nargs="+", type=int, default=[256], help="columns of a product")
    parser.add_argument("--reference", type=int, default=3, help="sweeps of the sequential form; 0 for none")
    parser.add_argument("--json", type=Path, help="also write the figures here")
    options = parser.parse_args()
    options.sweeps = options.sweeps or (30 if options.device == "cuda" else 12)
    options.precisions = options.precisions or (["float32", "tf32"] if options.device == "cuda" else ["float32"])
    report = run(options)
    if options.json:
        options.json.write_text(json.dumps(report, indent=1))
    return int(any(count for name, count in report["codes that differ"].items() if name.endswith("float64")))


if __name__ == "__main__":
    raise SystemExit(main())
