# SPDX-License-Identifier: Apache-2.0
"""Shared by the tests of exports: a tiny source and its finished blocks, rounded to nearest."""

from pathlib import Path
from typing import Any

import torch

from omniq.export import Report, export_checkpoint, verify_checkpoint
from omniq.grid.affine import Grid
from omniq.grid.scheme import Scheme
from omniq.models.source import SourceModel
from omniq.storage.block_result import BlockResult, QuantizedLinear
from tests.helpers.schemes import scheme_of
from tests.helpers.tiny import VOCAB_SIZE, save_tiny

CARD = {"base_model": "someone/tiny", "recipe": "scheme: W4A16g32\n", "seed": 7}
WINDOWS = torch.arange(2 * 24).view(2, 24) % VOCAB_SIZE


def rounded(source: SourceModel, grid: Grid) -> list[BlockResult]:
    """Every block, rounded to nearest; groups whose weights have one sign included (z = 0 and z = 2^b - 1)."""
    results = []
    for index in range(source.num_blocks):
        block = source.block(index, dtype=torch.float32)
        linears = {}
        for name in source.layout(0).linears:
            weight = block.get_parameter(f"{name}.weight").data.clone()
            weight[0], weight[1] = weight[0].abs(), -weight[1].abs()
            scale, zero_point = grid.fit(*grid.range(weight))
            linears[name] = QuantizedLinear.of(grid, grid.quantize(weight, scale, zero_point), scale, zero_point)
        quantized = {f"{name}.weight" for name in linears}
        others = {name: value.data for name, value in block.named_parameters() if name not in quantized}
        results.append(BlockResult(linears, others, {"loss": 0.5 + index, "note": "text"}))
    return results


def opened(folder: Path, grid: Grid, **overrides: Any) -> SourceModel:
    save_tiny(folder, dtype=grid.scale_dtype, **overrides)
    return SourceModel.open(folder)


def export(source: SourceModel, results: list[BlockResult], out: Path, **options: Any) -> Path:
    """``export_checkpoint`` with a card, and with the weight-only scheme of the first linear if none is given."""
    options["scheme"] = options.get("scheme") or _scheme(results)
    return export_checkpoint(source, results.__getitem__, out, **{"card": CARD, **options})


def verify(out: Path, source: SourceModel, results: list[BlockResult], **options: Any) -> Report:
    """``verify_checkpoint`` under the same default."""
    options["scheme"] = options.get("scheme") or _scheme(results)
    return verify_checkpoint(out, source, results.__getitem__, **options)


def _scheme(results: list[BlockResult]) -> Scheme:
    return scheme_of(next(linear.grid for result in results for linear in result.linears.values()))
