# SPDX-License-Identifier: Apache-2.0
"""The AWQ format in its GEMM layout, which transformers (with GPTQModel), vLLM, SGLang, MLC-LLM and MLX read.

    qweight  int32 [i, o / 8]      q
    qzeros   int32 [G, o / 8]      z
    scales   float16 [G, o]        s

A word holds eight outputs. Nibble ``k``, counted from the lowest bits, holds output ``(0, 2, 4, 6, 1, 3, 5, 7)[k]`` of
the eight. The kernels of AWQ unpack two nibbles at once in this order. Zero points have no offset, so every grid of
4 bits fits; narrower grids need ``export.container_bits: 4``.

Source: AutoAWQ, ``awq/modules/linear/gemm.py``; GPTQModel 7.6, ``quantization/awq/utils/packing_utils.py``;
transformers 5.23, ``integrations/awq.py``. In some families, transformers replaces the activation before the second
linear of the MLP by one with scales of its own. omniq's checkpoints have no such scales, so these families are refused.

Shapes: ``o`` output features, ``i`` input features, ``G`` groups of a row.
"""

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

_BITS = 4
_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)  # the output in each nibble of a word
_SCALED_ACTIVATIONS = ("bloom", "falcon", "gpt_bigcode", "gpt_neox", "gptj", "mpt", "starcoder2")  # of transformers


class Awq(WeightsOnly):
    """Codes of 4 bits, interleaved by outputs."""

    name = "awq"
    widths = (_BITS,)
    group_sizes = (32, 64, 128)  # common to GPTQModel's kernels on a CPU and to Marlin in vLLM
    requires: tuple[str, ...] = ("gptqmodel>=7.6",)

    def problem_of_family(self, layouts: Sequence[Layout]) -> str:
        """Refuse also families for which transformers expects scaled activations."""
        found = next((layout.model_type for layout in layouts if layout.model_type in _SCALED_ACTIVATIONS), None)
        if found is None:
            return super().problem_of_family(layouts)
        return f"does not support {found}, where transformers expects scaled activations: use gptq"

    def tensors(self, linear: QuantizedLinear) -> dict[str, Tensor]:
        """Convert one linear to tensors by the last part of their names."""
        return {
            "qweight": _pack_outputs(linear.codes.t()),
            "qzeros": _pack_outputs(linear.zero_point.t()),
            "scales": linear.scale.t().contiguous(),
        }

    def linear(self, stored: Mapping[str, Tensor], grid: Grid) -> QuantizedLinear:
        """Invert ``tensors``."""
        scale = stored["scales"].t()
        codes, zero_point = (_unpack_outputs(stored[key], scale.shape[0]).t() for key in ("qweight", "qzeros"))
        return QuantizedLinear(grid, codes, scale, zero_point)

    def quantization_config(self, linears: Mapping[str, WrittenLinear], ignore: Sequence[str]) -> dict[str, Any]:
        """The entry of ``config.json``, as transformers and vLLM read it."""
        grid = next(iter(linears.values())).grid
        return {
            "quant_method": "awq",
            "version": "gemm",
            "bits": grid.bits,
            "group_size": grid.group_size,
            "zero_point": not grid.symmetric,
            "modules_to_not_convert": list(ignore) or None,
        }

    def grid_of(self, name: str, config: Mapping[str, Any], dtype: torch.dtype) -> Grid:
        """Invert ``quantization_config`` for one linear."""
        if config["version"] != "gemm" or name in (config.get("modules_to_not_convert") or ()):
            raise KeyError(name)
        return Grid(config["bits"], config["group_size"], not config["zero_point"], dtype)


def _pack_outputs(numbers: Tensor) -> Tensor:
    """Pack ``[n, o]`` along the outputs, ``[n, o / 8]``."""
    return pack(numbers.unflatten(1, (-1, len(_ORDER)))[..., _ORDER].flatten(1), _BITS)


def _unpack_outputs(packed: Tensor, outputs: int) -> Tensor:
    """Invert ``_pack_outputs``."""
    numbers = unpack(packed, _BITS, outputs).unflatten(1, (-1, len(_ORDER)))
    return numbers[..., torch.tensor(_ORDER).argsort()].flatten(1)
