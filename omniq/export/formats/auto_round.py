# SPDX-License-Identifier: Apache-2.0
"""The format of AutoRound, which transformers reads with the package auto-round. vLLM reads it for symmetric grids.

The tensors are those of GPTQ without ``g_idx`` (``omniq.export.formats.gptq``). The packing format tells how zero
points are stored:

    auto_round:auto_gptq   z - 1, as in version 1 of GPTQ; if all grids are symmetric
    auto_round             z, as in version 2; otherwise

AutoRound reads the first one on a CPU only for symmetric grids, and vLLM does not know the second one. Linears may
differ in bits, group size and symmetry: ``extra_config`` lists those that differ from the rest.

Source: auto-round 0.16.1, ``inference/convert_model.py`` and ``inference/backend.py``.
"""

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from omniq.export.formats.codec import WrittenLinear
from omniq.export.formats.gptq import gptq_linear, gptq_tensors, read_zero_points
from omniq.export.formats.weights_only import WeightsOnly, block_list_of
from omniq.grid.affine import Grid
from omniq.storage.block_result import QuantizedLinear


class AutoRound(WeightsOnly):
    """Tensors as in GPTQ, a grid for each linear."""

    name = "auto-round"
    widths = (2, 3, 4, 8)
    one_grid = False
    requires: tuple[str, ...] = ("auto-round>=0.16",)

    def tensors(self, linear: QuantizedLinear) -> dict[str, Tensor]:
        """Convert one linear to tensors by the last part of their names."""
        return gptq_tensors(linear, self._offset)

    def linear(self, stored: Mapping[str, Tensor], grid: Grid) -> QuantizedLinear:
        """Invert ``tensors``."""
        return gptq_linear(stored, grid)

    def quantization_config(self, linears: Mapping[str, WrittenLinear], ignore: Sequence[str]) -> dict[str, Any]:
        """The entry of ``config.json``, as transformers, auto-round and vLLM read it."""
        (common, _), *_ = Counter(linear.grid for linear in linears.values()).most_common()
        blocks = block_list_of(linears)
        others = {name: _entry(linear.grid) for name, linear in linears.items() if linear.grid != common}
        plain = {name: {"bits": 16} for name in ignore if name.startswith(f"{blocks}.")}
        return {
            "quant_method": "auto-round",
            "packing_format": "auto_round:auto_gptq" if self._offset else "auto_round",
            "data_type": "int",
            "block_name_to_quantize": blocks,
            **_entry(common),
            **({"extra_config": others | plain} if others or plain else {}),
        }

    def grid_of(self, name: str, config: Mapping[str, Any], dtype: torch.dtype) -> Grid:
        """Invert ``quantization_config`` for one linear."""
        entry = config.get("extra_config", {}).get(name, config)
        zero_points = read_zero_points({"auto_round": 0, "auto_round:auto_gptq": 1}[config["packing_format"]])
        # a linear of 16 bits has only the key ``bits``
        return Grid(entry["bits"], entry["group_size"], entry["sym"], dtype, zero_points=zero_points)

    @property
    def _offset(self) -> int:
        """The number that is subtracted from zero points."""
        return int(all(grid.symmetric for grid in self._scheme.grids))


def _entry(grid: Grid) -> dict[str, Any]:
    return {"bits": grid.bits, "group_size": grid.group_size, "sym": grid.symmetric}
