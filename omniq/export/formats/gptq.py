# SPDX-License-Identifier: Apache-2.0
"""The GPTQ format, which transformers (with optimum and GPTQModel), vLLM and SGLang read.

    qweight  int32 [i b / 32, o]      q, a dense bitstream along the inputs
    qzeros   int32 [G, o b / 32]      z - 1 in version 1, z in version 2; a dense bitstream along the outputs
    scales   float16 [G, o]           s
    g_idx    int32 [i]                the group of each input, k // g; without it, transformers fails

Version 1 (``checkpoint_format: gptq``) cannot express a zero point of 0: most readers compute the stored number plus 1
without a carry, GPTQModel with a carry into the next number. It is used for symmetric grids, whose zero point is
``2^(b-1)``, and for asymmetric grids under ``scheme.zero_points: nonzero``. Other asymmetric grids use version 2
(``gptq_v2``), which fewer readers know.

Source: GPTQModel 7.6, ``nn_modules/qlinear``; transformers 5.23, ``quantizers/quantizer_gptq.py``. transformers builds
all linears from one number of bits and one group size, so a model has one grid here, although GPTQModel itself and vLLM
read others from ``dynamic``. Scales per channel are repeated for groups of 128, 64 or 32 inputs
(``omniq.export.restate``), because GPTQModel's kernel for 4 bits on a CPU does not support them.

Shapes: ``o`` output features, ``i`` input features, ``G`` groups of a row of ``g`` inputs, ``b`` bits.
"""

import re
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from omniq.export.formats.codec import WrittenLinear
from omniq.export.formats.packing import pack, unpack
from omniq.export.formats.weights_only import WeightsOnly, block_list_of
from omniq.grid.affine import Grid
from omniq.grid.name import ZeroPoints
from omniq.storage.block_result import QuantizedLinear


def gptq_tensors(linear: QuantizedLinear, offset: int) -> dict[str, Tensor]:
    """``qweight``, ``qzeros`` and ``scales`` of a linear, with zero points stored as ``z - offset``."""
    bits = linear.grid.bits
    return {
        "qweight": pack(linear.codes, bits).t().contiguous(),
        "qzeros": pack(linear.zero_point.t().contiguous() - offset, bits),
        "scales": linear.scale.t().contiguous(),
    }


def read_zero_points(offset: int) -> ZeroPoints:
    """The field of a grid that is read from a file with zero points stored as ``z - offset``."""
    return "nonzero" if offset else "any"


def gptq_linear(stored: Mapping[str, Tensor], grid: Grid) -> QuantizedLinear:
    """Invert ``gptq_tensors``.

    Args:
        stored: the tensors.
        grid: the grid that ``config.json`` describes; ``read_zero_points`` tells how its zero points are stored.

    Raises:
        KeyError: a tensor is missing.
        ValueError: a tensor has an impossible shape, dtype or content.
    """
    scale = stored["scales"].t()
    packed = stored["qweight"].t()
    inputs = 32 * packed.shape[1] // grid.bits
    zero_point = unpack(stored["qzeros"], grid.bits, scale.shape[0]) + int(grid.zero_points != "any")
    if zero_point.numel() and int(zero_point.max()) > grid.max_code:
        raise ValueError(f"a zero point is {int(zero_point.max())}, above {grid.max_code}")
    return QuantizedLinear(grid, unpack(packed, grid.bits, inputs), scale, zero_point.t())


class Gptq(WeightsOnly):
    """Version 1 for grids without a zero point of 0, version 2 for all others."""

    name = "gptq"
    widths = (2, 3, 4, 8)
    group_sizes = (32, 64, 128, 256, 512, 1024)  # of GPTQModel; 16 fails for 4 bits on a CPU
    requires: tuple[str, ...] = ("gptqmodel>=7.6", "optimum>=2.3")

    def check_linear(self, name: str, linear: QuantizedLinear) -> None:
        """Refuse also a zero point of 0 in version 1."""
        super().check_linear(name, linear)
        if _offset(linear.grid) and bool((linear.zero_point == 0).any()):
            raise ValueError(f"{name}: a zero point is 0, although the scheme excludes it")

    def tensors(self, linear: QuantizedLinear) -> dict[str, Tensor]:
        """Convert one linear to tensors by the last part of their names."""
        return gptq_tensors(linear, _offset(linear.grid)) | {"g_idx": _group_of_inputs(linear.codes, linear.grid)}

    def linear(self, stored: Mapping[str, Tensor], grid: Grid) -> QuantizedLinear:
        """Invert ``tensors``."""
        linear = gptq_linear(stored, grid)
        if not torch.equal(stored["g_idx"], _group_of_inputs(linear.codes, grid)):
            raise ValueError(f"g_idx does not give groups of {grid.group_size} inputs in order")
        return linear

    def quantization_config(self, linears: Mapping[str, WrittenLinear], ignore: Sequence[str]) -> dict[str, Any]:
        """The entry of ``config.json``, as transformers, GPTQModel and vLLM read it.

        Linears of blocks that stay in floating point are left out of the list that optimum reads, and excluded by the
        expressions that GPTQModel and vLLM read.
        """
        grid, blocks = next(iter(linears.values())).grid, block_list_of(linears)
        plain = [name for name in ignore if name.startswith(f"{blocks}.")]
        partly = {
            "modules_in_block_to_quantize": [list(linears)],
            "dynamic": {f"-:^{re.escape(name)}$": {} for name in plain},
        }
        return {
            "quant_method": "gptq",
            "checkpoint_format": "gptq" if _offset(grid) else "gptq_v2",
            "bits": grid.bits,
            "group_size": grid.group_size,
            "sym": grid.symmetric,
            "desc_act": False,
            "lm_head": False,
            "true_sequential": True,
            "damp_percent": 0.01,  # not used by readers, but transformers requires a number between 0 and 1
            "block_name_to_quantize": blocks,
            **(partly if plain else {}),
        }

    def grid_of(self, name: str, config: Mapping[str, Any], dtype: torch.dtype) -> Grid:
        """Invert ``quantization_config`` for one linear."""
        own = [key for key in config.get("dynamic", {}) if not key.startswith("-:")]
        if own or name not in sum(config.get("modules_in_block_to_quantize") or [[name]], []):
            raise KeyError(name)
        zero_points = read_zero_points(int(config.get("checkpoint_format") != "gptq_v2"))  # older files: version 1
        return Grid(config["bits"], config["group_size"], config["sym"], dtype, zero_points=zero_points)


def _offset(grid: Grid) -> int:
    """The number that is subtracted from zero points: 1 in version 1, and 0 in version 2."""
    return int(grid.symmetric or grid.zero_points != "any")


def _group_of_inputs(codes: Tensor, grid: Grid) -> Tensor:
    inputs = codes.shape[1]
    return torch.arange(inputs, dtype=torch.int32) // (inputs // grid.groups(inputs))
