# SPDX-License-Identifier: Apache-2.0
"""The layout of MLX, which runs on the GPUs of iPhone, iPad and Mac.

    weight   uint32 [o, i b / 32]   q, a dense bitstream along the inputs, the same bytes as in compressed-tensors
    scales   [o, G]                 s
    biases   [o, G]                 -z s, so that the weight is q s + biases

``scales`` and ``biases`` have one dtype. float16 holds ``q s`` only if ``s`` has at most ``11 - b`` significant bits.
float32 holds all products of float16 scales and codes, so a linear with other scales is stored in float32, and MLX then
computes it in float32. MLX adds two rounded products, so with float16 the weights would deviate by 1e-3 of the largest
weight (measured on SmolLM2, 3 bits with zero points).

Groups have 32, 64 or 128 inputs. Scales per channel are repeated for such groups (``omniq.export.restate``).

``config.json`` has the same grids twice, as mlx-lm writes them: under ``quantization``, which MLX reads, and under
``quantization_config``, where omniq adds whether each grid is symmetric. Source: mlx 0.32, ``nn/layers/quantized.py``;
mlx-lm 0.32, ``utils.py``.

Shapes: ``o`` output features, ``i`` input features, ``G`` groups of a row, ``b`` bits.
"""

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from omniq.export.formats.codec import WrittenLinear
from omniq.export.formats.packing import pack, unpack
from omniq.export.formats.weights_only import WeightsOnly
from omniq.grid.affine import Grid
from omniq.models.layout import Layout
from omniq.storage.block_result import QuantizedLinear

MODEL_TYPES = ("gemma", "gemma3_text", "llama", "mistral", "phi3", "qwen2", "qwen3")
"""Model types whose logits in mlx-lm 0.32 are those of transformers. Its gemma2 ignores sliding windows."""


class Mlx(WeightsOnly):
    """Codes with scales and biases."""

    name = "mlx"
    widths = (2, 3, 4, 5, 6, 8)
    group_sizes = (32, 64, 128)
    one_grid = False
    requires: tuple[str, ...] = ("mlx-lm>=0.30",)

    def problem_of_family(self, layouts: Sequence[Layout]) -> str:
        """The reason why mlx-lm cannot open this family, as the end of a sentence; empty if it can."""
        unknown = next((layout.model_type for layout in layouts if layout.model_type not in MODEL_TYPES), None)
        return "" if unknown is None else f"does not support models of type {unknown!r}: use another format"

    def tensors(self, linear: QuantizedLinear) -> dict[str, Tensor]:
        """Convert one linear to tensors by the last part of their names."""
        scale = linear.scale.float()
        largest = scale * linear.grid.max_code
        dtype = torch.float16 if torch.equal(largest.half().float(), largest) else torch.float32
        return {
            "weight": pack(linear.codes, linear.grid.bits).view(torch.uint32),
            "scales": scale.to(dtype),
            "biases": (-scale * linear.zero_point).to(dtype),
        }

    def linear(self, stored: Mapping[str, Tensor], grid: Grid) -> QuantizedLinear:
        """Invert ``tensors``.

        Raises:
            KeyError: a tensor is missing.
            ValueError: a tensor has an impossible shape or content.
        """
        scale, biases = stored["scales"].float(), stored["biases"].float()
        zero_point = (-biases / scale).round().clamp(0, grid.max_code)
        held = scale.to(grid.scale_dtype)
        if not torch.equal(-scale * zero_point, biases) or not torch.equal(held.float(), scale):
            raise ValueError(f"scales and biases are not those of a grid of {grid.bits} bits")
        codes = unpack(stored["weight"].view(torch.int32), grid.bits, grid.group_size * scale.shape[1])
        return QuantizedLinear.of(grid, codes, held, zero_point)

    def quantization_config(self, linears: Mapping[str, WrittenLinear], ignore: Sequence[str]) -> dict[str, Any]:
        """The entry of ``config.json``: the most common grid, the grids of other linears, and all symmetric linears."""
        grids = {name: _entry(linear.grid) for name, linear in linears.items()}
        common = dict(Counter(tuple(entry.items()) for entry in grids.values()).most_common(1)[0][0])
        return {
            **common,
            "mode": "affine",
            **{name: entry for name, entry in grids.items() if entry != common},
            **dict.fromkeys(ignore, False),
            "symmetric": [name for name, linear in linears.items() if linear.grid.symmetric],
        }

    def grid_of(self, name: str, config: Mapping[str, Any], dtype: torch.dtype) -> Grid:
        """Invert ``quantization_config`` for one linear."""
        entry = config.get(name, config)
        if entry is False:
            raise KeyError(name)
        return Grid(entry["bits"], entry["group_size"], name in config["symmetric"], dtype)


def _entry(grid: Grid) -> dict[str, int]:
    return {"group_size": grid.group_size, "bits": grid.bits}
