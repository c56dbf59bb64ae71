# SPDX-License-Identifier: Apache-2.0
"""Packing the linears of one LLaMA block into every export format, and back.

    python benchmarks/packing.py                      # the seven linears of LLaMA-7B, on the CPU as an export does it
    python benchmarks/packing.py --device cpu         # the same for a SmolLM2-135M block, in seconds: for make bench
    python benchmarks/packing.py --json results.json

    pack s      one block, codes and zero points, median of the repeats
    GB/s        bytes of codes (one a weight) over that time
    7B s        the same for all 32 blocks of LLaMA-7B
    floor s     one block: codes in and packed words out, over the copy bandwidth measured in the same run
    plain s     one block in plain numpy, the same layout (for the layouts that have a plain form here): every code is
                spread into its bits, and the bits are gathered
    read s      back to codes

A random block is packed; what it takes does not depend on the codes. Both forms are compared before they are timed.
"""

import argparse
import json
import resource
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy
import torch
from torch import Tensor

from omniq.errors import UserError
from omniq.export.registry import FORMATS
from omniq.quantizers.scheme import Scheme
from omniq.result import QuantizedLinear

LLAMA_7B = [(4096, 4096)] * 4 + [(11008, 4096)] * 2 + [(4096, 11008)]
SMOLLM2 = [(576, 576)] * 2 + [(192, 576)] * 2 + [(1536, 576)] * 2 + [(576, 1536)]
WEIGHTS_7B = 32 * sum(rows * columns for rows, columns in LLAMA_7B)
SCHEMES = ("W2A16g64", "W3A16g64", "W4A16", "W8A8")


def random_linear(shape: tuple[int, int], scheme: Scheme) -> QuantizedLinear:
    """Codes, scales and zero points without meaning."""
    grid, (rows, columns) = scheme.grid, shape
    groups = 1 if grid.group_size == -1 else columns // grid.group_size
    codes = torch.randint(0, 2**grid.bits, shape, dtype=torch.uint8)
    zero_point = torch.randint(0, 2**grid.bits, (rows, groups), dtype=torch.uint8)
    return QuantizedLinear(grid, codes, torch.rand(rows, groups).to(grid.scale_dtype), zero_point)


def plain_bitstream(codes: Tensor, bits: int) -> Tensor:
    """Codes ``[o, i]`` as a dense little-endian bitstream in int32 words, element by element in numpy."""
    values = codes.numpy()
    spread = (values[:, :, None] >> numpy.arange(bits, dtype=numpy.uint8)) & 1  # [o, i, b]
    stream = numpy.packbits(spread.reshape(len(values), -1), axis=1, bitorder="little")
    padded = numpy.pad(stream, ((0, 0), (0, -stream.shape[1] % 4)))
    return torch.from_numpy(padded.view(numpy.int32))


def plain(linear: QuantizedLinear, scheme: Scheme) -> dict[str, Tensor]:
    """compressed-tensors, plainly: the codes, and the zero points along the other dimension."""
    bits = linear.grid.bits
    if scheme.activation_bits != 16:
        shift = 2 ** (bits - 1)
        return {
            "weight": (linear.codes.short() - shift).to(torch.int8),
            "weight_zero_point": (linear.zero_point.short() - shift).to(torch.int8),
        }
    zero_point = plain_bitstream(linear.zero_point.t().contiguous(), bits).t().contiguous()
    return {"weight_packed": plain_bitstream(linear.codes, bits), "weight_zero_point": zero_point}


PLAIN: dict[str, Callable[[QuantizedLinear, Scheme], dict[str, Tensor]]] = {"compressed-tensors": plain}


def seconds(run: Callable[[], Any], repeats: int) -> float:
    """Median time of a call, after one to warm up."""
    times = []
    for _ in range(repeats + 1):
        start = time.perf_counter()
        run()
        times.append(time.perf_counter() - start)
    return statistics.median(times[1:])


def copy_bandwidth(repeats: int) -> float:
    """Bytes a second that a copy reads and writes."""
    source = torch.ones(64 * 2**20, dtype=torch.uint8)
    target = torch.empty_like(source)
    return 2 * source.nbytes / seconds(lambda: target.copy_(source), repeats)


def compare(name: str, linears: list[QuantizedLinear], packed: list[dict[str, Tensor]], scheme: Scheme) -> None:
    """Stop if the plain form is another layout, or if reading does not invert packing."""
    layout = FORMATS[name]
    for linear, tensors in zip(linears, packed, strict=True):
        for key, value in PLAIN[name](linear, scheme).items() if name in PLAIN else ():
            if not torch.equal(value, tensors[f"x.{key}"]):
                raise SystemExit(f"{name} {scheme.name}: the plain form of {key} differs")
        if not torch.equal(layout.read("x", tensors, scheme).codes, linear.codes):
            raise SystemExit(f"{name} {scheme.name}: codes do not come back")


def measure(name: str, scheme: Scheme, shapes: list[tuple[int, int]], repeats: int, bandwidth: float) -> dict[str, Any]:
    """One line of the table."""
    layout = FORMATS[name]
    linears = [random_linear(shape, scheme) for shape in shapes]
    packed = [layout.tensors("x", linear, scheme) for linear in linears]
    compare(name, linears, packed, scheme)
    weights = sum(linear.codes.numel() for linear in linears)
    out = sum(tensor.nbytes for tensors in packed for tensor in tensors.values())
    pack = seconds(lambda: [layout.tensors("x", linear, scheme) for linear in linears], repeats)
    read = seconds(lambda: [layout.read("x", tensors, scheme) for tensors in packed], repeats)
    form = PLAIN.get(name)
    slow = seconds(lambda: [form(linear, scheme) for linear in linears], 1) if form is not None else None
    return {
        "format": name,
        "scheme": scheme.name,
        "pack_s": pack,
        "codes_gb_per_s": weights / pack / 1e9,
        "all_7b_s": pack * WEIGHTS_7B / weights,
        "floor_s": (weights + out) / bandwidth,
        "plain_s": slow,
        "speedup": None if slow is None else slow / pack,
        "read_s": read,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", choices=("cpu",), help="a small block, as make bench wants it")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--json", type=Path, help="write the results to this file as well")
    arguments = parser.parse_args()
    shapes, bandwidth = SMOLLM2 if arguments.device == "cpu" else LLAMA_7B, copy_bandwidth(arguments.repeats)
    print(f"CPU, {torch.get_num_threads()} threads, torch {torch.__version__}, copy {bandwidth / 1e9:.1f} GB/s")
    print(f"{'format':20} {'scheme':10} {'pack s':>8} {'GB/s':>7} {'7B s':>7} {'floor s':>8} {'plain s':>8} "
          f"{'speedup':>8} {'read s':>8}")  # fmt: skip
    rows = []
    for name, layout in sorted(FORMATS.items()):
        for wanted in SCHEMES:
            scheme = Scheme(wanted)
            try:
                layout.check(scheme)
            except UserError:
                continue  # this format has no such layout
            row = measure(name, scheme, shapes, arguments.repeats, bandwidth)
            rows.append(row)
            slow = "       -        -" if row["plain_s"] is None else f"{row['plain_s']:8.3f} {row['speedup']:7.1f}x"
            print(f"{name:20} {wanted:10} {row['pack_s']:8.4f} {row['codes_gb_per_s']:7.2f} {row['all_7b_s']:7.1f} "
                  f"{row['floor_s']:8.4f} {slow} {row['read_s']:8.4f}")  # fmt: skip
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    print(f"peak memory of this process {peak / 2**30:.2f} GiB")
    if arguments.json is not None:
        result = {"threads": torch.get_num_threads(), "torch": torch.__version__, "peak_bytes": peak, "rows": rows}
        arguments.json.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
