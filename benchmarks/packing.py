# SPDX-License-Identifier: Apache-2.0
"""Packing the linears of one LLaMA block into every export format, and back.

    python benchmarks/packing.py                      # the seven linears of LLaMA-7B, on the CPU as an export does it
    python benchmarks/packing.py --device cpu         # the same for a SmolLM2-135M block, in seconds: for make bench
    python benchmarks/packing.py --json results.json

    pack s      one block, codes and zero points, median of the repeats
    GB/s        bytes of codes (one a weight) over that time
    7B s        the same for all 32 blocks of LLaMA-7B
    floor s     one block: codes and zero points in, packed words out, over the copy bandwidth measured in the same run
                (scales are handed on; there is no arithmetic beside shifts)
    plain s     one block in plain numpy, the same layout: every code is spread into its bits, and the bits are gathered
    speedup     plain over pack
    read s      back to codes
    MiB         peak memory of packing one block beside its codes, the packed words included
                (``measuring/machine.py``)

A random block is packed; what it takes does not depend on the codes. Both forms are compared before they are timed.
"""

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy
import torch
from measuring.llama import SHAPES
from measuring.machine import Work, copy_bandwidth, name_of, peak_bytes, seconds_of, write_json
from torch import Tensor

from omniq.errors import UserError
from omniq.export.registry import FORMATS
from omniq.grid.scheme import Scheme
from omniq.storage.block_result import QuantizedLinear

WEIGHTS_7B = 32 * sum(rows * columns for rows, columns in SHAPES["7b"].linears)
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


def plain_bits(linear: QuantizedLinear, scheme: Scheme) -> dict[str, Tensor]:
    """Dense bitstreams, plainly: the codes, and the zero points along the other dimension."""
    bits = linear.grid.bits
    zero_point = plain_bitstream(linear.zero_point.t().contiguous(), bits).t().contiguous()
    return {"weight_packed": plain_bitstream(linear.codes, bits), "weight_zero_point": zero_point}


def plain_bytes(linear: QuantizedLinear, scheme: Scheme) -> dict[str, Tensor]:
    """compressed-tensors, plainly: signed bytes where activations are integers too, else bitstreams."""
    if scheme.activation_bits == 16:
        return plain_bits(linear, scheme)
    shift = 2 ** (linear.grid.bits - 1)
    return {
        "weight": (linear.codes.short() - shift).to(torch.int8),
        "weight_zero_point": (linear.zero_point.short() - shift).to(torch.int8),
    }


def plain_columns(linear: QuantizedLinear, scheme: Scheme) -> dict[str, Tensor]:
    """GPTQ and AutoRound, plainly: bitstreams along the inputs and the outputs, transposed; asymmetric."""
    bits = linear.grid.bits
    zero_point = plain_bitstream(linear.zero_point.t().contiguous(), bits)
    return {"qweight": plain_bitstream(linear.codes, bits).t(), "qzeros": zero_point}


def plain_interleaved(linear: QuantizedLinear, scheme: Scheme) -> dict[str, Tensor]:
    """AWQ, plainly: eight outputs a word, in the order of its nibbles."""

    def packed(numbers: Tensor) -> Tensor:
        order = numpy.arange(numbers.shape[1]).reshape(-1, 8)[:, [0, 2, 4, 6, 1, 3, 5, 7]].flatten()
        return plain_bitstream(numbers[:, order], 4)

    return {"qweight": packed(linear.codes.t()), "qzeros": packed(linear.zero_point.t())}


PLAIN: dict[str, Callable[[QuantizedLinear, Scheme], dict[str, Tensor]]] = {
    "compressed-tensors": plain_bytes,
    "omniq": plain_bits,
    "gptq": plain_columns,
    "awq": plain_interleaved,
    "auto-round": plain_columns,
}


def compare(name: str, linears: list[QuantizedLinear], packed: list[dict[str, Tensor]], scheme: Scheme) -> None:
    """Stop if the plain form is another layout, or if reading does not invert packing."""
    codec = FORMATS[name].codec(scheme)
    for linear, tensors in zip(linears, packed, strict=True):
        for key, value in PLAIN[name](linear, scheme).items():
            if not torch.equal(value, tensors[f"x.{key}"]):
                raise SystemExit(f"{name} {scheme.name}: the plain form of {key} differs")
        if not torch.equal(codec.load("x", tensors, scheme.grid).codes, linear.codes):
            raise SystemExit(f"{name} {scheme.name}: codes do not come back")


def work_of(linears: list[QuantizedLinear], packed: list[dict[str, Tensor]]) -> Work:
    """What must be read and written; what is handed on as it is takes neither."""
    moved = sum(linear.codes.nbytes + linear.zero_point.nbytes for linear in linears)
    for linear, tensors in zip(linears, packed, strict=True):
        moved += sum(tensor.nbytes for tensor in tensors.values() if tensor.data_ptr() != linear.scale.data_ptr())
    return Work(0, moved)


def measure(name: str, scheme: Scheme, shapes: list[tuple[int, int]], repeats: int, bandwidth: float) -> dict[str, Any]:
    """One line of the table."""
    codec, form = FORMATS[name].codec(scheme), PLAIN[name]
    linears = [random_linear(shape, scheme) for shape in shapes]
    packed = [codec.store("x", linear) for linear in linears]
    compare(name, linears, packed, scheme)
    weights = sum(linear.codes.numel() for linear in linears)

    def pack() -> list[dict[str, Tensor]]:
        return [codec.store("x", linear) for linear in linears]

    seconds = seconds_of(pack, "cpu", repeats, 1)
    slow = seconds_of(lambda: [form(linear, scheme) for linear in linears], "cpu", 1, 1)
    read = seconds_of(lambda: [codec.load("x", tensors, scheme.grid) for tensors in packed], "cpu", repeats, 1)
    return {
        "format": name,
        "scheme": scheme.name,
        "pack_s": seconds,
        "codes_gb_per_s": weights / seconds / 1e9,
        "all_7b_s": seconds * WEIGHTS_7B / weights,
        "floor_s": work_of(linears, packed).moved / bandwidth,
        "plain_s": slow,
        "speedup": slow / seconds,
        "read_s": read,
        "pack_mib": peak_bytes(pack, "cpu") / 2**20,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", choices=("cpu",), help="a small block, as make bench wants it")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--json", type=Path, help="write the results to this file as well")
    arguments = parser.parse_args()
    shapes = SHAPES["smollm2" if arguments.device == "cpu" else "7b"].linears
    bandwidth = copy_bandwidth("cpu")
    print(f"{name_of('cpu')}, torch {torch.__version__}, copy {bandwidth / 1e9:.1f} GB/s")
    print(f"{'format':20} {'scheme':10} {'pack s':>8} {'GB/s':>7} {'7B s':>7} {'floor s':>8} {'plain s':>8} "
          f"{'speedup':>8} {'read s':>8} {'MiB':>7}")  # fmt: skip
    rows = []
    for name, format in sorted((name, FORMATS[name]) for name in PLAIN):
        for wanted in SCHEMES:
            scheme = Scheme(wanted)
            try:
                format.codec(scheme).check(grids={scheme.grid: shapes})
            except UserError:
                continue  # this format has no such layout
            row = measure(name, scheme, shapes, arguments.repeats, bandwidth)
            rows.append(row)
            print(f"{name:20} {wanted:10} {row['pack_s']:8.4f} {row['codes_gb_per_s']:7.2f} {row['all_7b_s']:7.1f} "
                  f"{row['floor_s']:8.4f} {row['plain_s']:8.3f} {row['speedup']:7.1f}x {row['read_s']:8.4f} "
                  f"{row['pack_mib']:7.1f}")  # fmt: skip
    write_json(arguments.json, "cpu", {"bytes_per_second": bandwidth, "rows": rows})


if __name__ == "__main__":
    main()
