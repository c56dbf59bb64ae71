# SPDX-License-Identifier: Apache-2.0
"""The compressed-tensors format, which transformers, vLLM and SGLang read with one small package.

The scheme determines one of two layouts. ``q`` and ``z`` are omniq's codes and zero points in ``[0, 2^b - 1]``, and
``u = 2^(b-1)``:

``pack-quantized`` for weight-only models:
    weight_packed      int32 [o, ceil(i b / 32)]   q, a dense bitstream along the inputs
    weight_scale       [o, G]                      s, in the export dtype
    weight_zero_point  int32 [ceil(o b / 32), G]   z, a dense bitstream along the outputs; asymmetric only
    weight_shape       int64 [2]                   o, i

``int-quantized`` for models with integer activations:
    weight             int8 [o, i]                 q - u
    weight_scale       [o, G]                      s
    weight_zero_point  int8 [o, G]                 z - u; asymmetric only
    input_scale        [1]                         scale of the linear's input, if one range is fixed for all tokens
    input_zero_point   int8 [1]                    signed; asymmetric activations only

The runtime computes ``(q - z) * s`` in the dtype of ``s``. Integers up to 255 are exact there and the product is
rounded once, so the result equals ``QuantizedLinear.dequantize`` bit for bit as long as the model runs in this dtype.

Five pitfalls, all observed in transformers 5.23:

* Asymmetric ``pack-quantized`` files fail to load by default, because the loader expects an unpacked zero point. The
  key ``dequantize: true`` in ``config.json`` makes plain ``from_pretrained`` unpack them while loading; other readers
  ignore it. The key also drops integer activations, so ``int-quantized`` files never have it.
* This loading path reads the whole model with the grid of its first group. Asymmetric ``pack-quantized`` models with
  several grids would silently load wrong weights and are refused. All other models have one group for each grid, whose
  ``targets`` are the full names of its linears. A model with one grid has the target ``Linear`` and a list of linears
  to ignore.
* With a range for each token, an input of two dimensions gets one range for all tokens. OPT flattens samples and tokens
  before its MLP. Such a family needs fixed ranges, and is refused without them.
* Experts are read with one symmetric grid; their zero points and the quantization of their inputs would be ignored.
* ``format`` must also be in the group; otherwise the layout is inferred from the presence of activations.
"""

from collections.abc import Collection, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from omniq.errors import UserError
from omniq.export.formats.codec import (
    NO_GRIDS,
    Shape,
    WrittenLinear,
    check_middle,
    check_scheme,
    is_of_expert,
    stored_under,
)
from omniq.export.formats.packing import pack, unpack
from omniq.grid.affine import Grid
from omniq.grid.scheme import Scheme
from omniq.models.layout import Layout
from omniq.quantizers.activations import StaticGrid
from omniq.storage.block_result import QuantizedLinear

_NAME = "compressed-tensors"  # as users write it


class PackQuantized:
    """Codes as a dense bitstream."""

    name = "pack-quantized"

    def store(self, linear: QuantizedLinear) -> dict[str, Tensor]:
        """Convert one linear to tensors by the last part of their names."""
        bits = linear.grid.bits
        stored = {
            "weight_packed": pack(linear.codes, bits),
            "weight_scale": linear.scale,
            "weight_shape": torch.tensor(linear.codes.shape, dtype=torch.int64),
        }
        if not linear.grid.symmetric:
            stored["weight_zero_point"] = pack(linear.zero_point, bits, dim=0)
        return stored

    def load(self, stored: Mapping[str, Tensor], grid: Grid) -> QuantizedLinear:
        """Invert ``store``."""
        outputs, inputs = stored["weight_shape"].tolist()
        codes = unpack(stored["weight_packed"], grid.bits, inputs)
        scale = stored["weight_scale"]
        if grid.symmetric:
            return QuantizedLinear(grid, codes, scale, _middle(scale, grid))
        return QuantizedLinear(grid, codes, scale, unpack(stored["weight_zero_point"], grid.bits, outputs, dim=0))


class IntQuantized:
    """Codes as signed bytes, independent of their bits.

    Args:
        input_symmetric: True if zero points of inputs are not stored.
    """

    name = "int-quantized"

    def __init__(self, input_symmetric: bool) -> None:
        self.input_symmetric = input_symmetric

    def store(self, linear: QuantizedLinear) -> dict[str, Tensor]:
        """Convert one linear to tensors by the last part of their names."""
        stored = {"weight": _signed(linear.codes, linear.grid), "weight_scale": linear.scale}
        if not linear.grid.symmetric:
            stored["weight_zero_point"] = _signed(linear.zero_point, linear.grid)
        if linear.input is not None:
            stored["input_scale"] = linear.input.scale
            stored |= {} if self.input_symmetric else {"input_zero_point": linear.input.zero_point}
        return stored

    def load(self, stored: Mapping[str, Tensor], grid: Grid) -> QuantizedLinear:
        """Invert ``store``."""
        codes, scale = _unsigned(stored["weight"], grid), stored["weight_scale"]
        zero_point = _middle(scale, grid) if grid.symmetric else _unsigned(stored["weight_zero_point"], grid)
        fixed = None
        if "input_scale" in stored:
            none = torch.zeros(1, dtype=torch.int8)
            fixed = StaticGrid(stored["input_scale"], none if self.input_symmetric else stored["input_zero_point"])
        return QuantizedLinear(grid, codes, scale, zero_point, input=fixed)


class CompressedTensors:
    """``pack-quantized`` if only weights are integers, ``int-quantized`` if activations are integers too."""

    requires: tuple[str, ...] = ("compressed-tensors>=0.18",)  # older versions misread codes of 3, 5, 6 and 7 bits
    stays_packed = False

    def __init__(self, scheme: Scheme) -> None:
        self._scheme = scheme
        self._weights_only = scheme.activation_bits == 16
        self._layout = PackQuantized() if self._weights_only else IntQuantized(scheme.activation_symmetric)

    def check(
        self,
        layouts: Sequence[Layout] = (),
        grids: Mapping[Grid, Collection[Shape]] = NO_GRIDS,
        outliers: bool = False,
    ) -> None:
        """Refuse schemes that the files or transformers' reader do not support.

        These are outliers, quantized queries, keys and values, flat inputs with a range for each token, several grids
        of which one is asymmetric, and unsupported dtypes of scales.

        Raises:
            UserError: names the scheme and the remedy.
        """
        scheme, problem = self._scheme, self._problem_of_experts(layouts, grids)
        flat = next((layout for layout in layouts if layout.flat), None)
        if problem:
            check_scheme(scheme, _NAME, problem)
        if outliers:
            problem = (
                "does not support the sparse outliers or quantized scales of this method: use format omniq, or a "
                "method without them"
            )
        elif scheme.kv_bits != 16:
            problem = f"does not support a dynamic KV cache of {scheme.kv_bits} bits: use KV16, or format omniq"
        elif not self._weights_only and not scheme.activations.static and flat is not None:
            problem = (
                f"does not support a range for each token in {', '.join(flat.flat)} of {flat.model_type}, where "
                "transformers would use one range for all tokens: set scheme.activation_range to tensor, use format "
                "omniq, or use A16"
            )
        elif scheme.queries:
            problem = "does not support quantized queries: set scheme.queries to false, or use format omniq"
        elif self._weights_only and len(grids) > 1 and not all(grid.symmetric for grid in grids):
            problem = (
                f"does not support {len(grids)} grids of which one is asymmetric, because transformers reads all "
                "weights of such a checkpoint with one grid: use format omniq, or set scheme.symmetric to true"
            )
        check_scheme(scheme, _NAME, problem)

    def _problem_of_experts(self, layouts: Sequence[Layout], grids: Mapping[Grid, Collection[Shape]]) -> str:
        """The reason why transformers' reader cannot hold the experts, with the remedy; empty if it can.

        It dequantizes experts while it merges them: with one symmetric grid, and without their inputs.
        """
        experts = [layout for layout in layouts if any(map(is_of_expert, layout.linears))]
        if not experts:
            return ""
        where = f"in experts of {experts[0].model_type}"
        if not self._weights_only:
            return f"does not support quantized inputs {where}: use format omniq, or a scheme with A16"
        if not all(grid.symmetric for grid in grids):
            return f"does not support asymmetric grids {where}: set scheme.symmetric to true, or use format omniq"
        if len(grids) > 1:
            return f"does not support {len(grids)} grids {where}: use format omniq, or one grid"
        if any(map(is_of_expert, (name for layout in experts for name in layout.kept))):
            return f"does not support linears in floating point {where}: use format omniq, or quantize all experts"
        return ""

    def check_linear(self, name: str, linear: QuantizedLinear) -> None:
        """Refuse a linear with a part that the files cannot store, or without a part that the scheme requires.

        Raises:
            UserError: the linear has outliers or quantized scales.
            ValueError: the zero point of a symmetric linear is not the middle of the code range, or the linear has no
                range of its input although the scheme fixes it.
        """
        for part, what in ((linear.outliers, "outliers"), (linear.grid.second, "quantized scales")):
            if part is not None:
                raise UserError(f"{name} has {what}, which format {_NAME} does not support: use format omniq")
        check_middle(name, linear)
        if self._scheme.activations.static and linear.input is None:
            raise ValueError(f"{name}: the range of its input is missing, although the scheme fixes it")

    def bits(self, grid: Grid) -> int:
        """Bits of a code on disk; always 8 if activations are integers too."""
        return grid.bits if self._weights_only else 8

    def store(self, name: str, linear: QuantizedLinear) -> dict[str, Tensor]:
        """Convert one linear to tensors by full name."""
        return {f"{name}.{key}": tensor for key, tensor in self._layout.store(linear).items()}

    def load(self, name: str, tensors: Mapping[str, Tensor], grid: Grid) -> QuantizedLinear:
        """Invert ``store``."""
        return self._layout.load(stored_under(name, tensors), grid)

    def quantization_config(self, linears: Mapping[str, WrittenLinear], ignore: Sequence[str]) -> dict[str, Any]:
        """The entry of ``config.json``, with a group of linears for each grid (see the pitfalls above)."""
        members: dict[Grid, list[str]] = {}
        for name, linear in linears.items():
            members.setdefault(linear.grid, []).append(name)
        groups = {
            f"group_{number}": {
                "targets": ["Linear"] if len(members) == 1 else names,
                "format": self._layout.name,
                "weights": _weights(grid),
                "input_activations": _activations(self._scheme),
                "output_activations": None,
            }
            for number, (grid, names) in enumerate(members.items())
        }
        config = {
            "quant_method": "compressed-tensors",
            "format": self._layout.name,
            "quantization_status": "compressed",
            "ignore": list(ignore),
            "kv_cache_scheme": None,
            "config_groups": groups,
        }
        unpacked = self._weights_only and not all(grid.symmetric for grid in members)
        return config | ({"dequantize": True} if unpacked else {})

    def grid_of(self, name: str, config: Mapping[str, Any], dtype: torch.dtype) -> Grid:
        """Invert ``quantization_config`` for one linear.

        Args:
            name: full name of the linear.
            config: the entry of ``config.json``.
            dtype: dtype of the model and of the scales.

        Raises:
            KeyError, TypeError, AttributeError, UserError: omniq does not write such a config.
        """
        groups = [group for group in config["config_groups"].values() if {name, "Linear"} & {*group["targets"]}]
        if len(groups) != 1:
            raise KeyError(name)
        weights = groups[0]["weights"]
        return Grid(weights["num_bits"], weights["group_size"] or -1, weights["symmetric"], dtype)


def _weights(grid: Grid) -> dict[str, Any]:
    return {
        "num_bits": grid.bits,
        "type": "int",
        "symmetric": grid.symmetric,
        "strategy": "channel" if grid.group_size == -1 else "group",
        "group_size": None if grid.group_size == -1 else grid.group_size,
        "dynamic": False,
    }


def _activations(scheme: Scheme) -> dict[str, Any] | None:
    if scheme.activation_bits == 16:
        return None
    return {
        "num_bits": scheme.activation_bits,
        "type": "int",
        "symmetric": scheme.activation_symmetric,
        "strategy": scheme.activation_range,
        "dynamic": not scheme.activations.static,
    }


def _middle(scale: Tensor, grid: Grid) -> Tensor:
    """The zero points of a symmetric grid, uint8, in the shape of ``scale``."""
    return torch.full_like(scale, 2 ** (grid.bits - 1), dtype=torch.uint8)


def _signed(codes: Tensor, grid: Grid) -> Tensor:
    return (codes.to(torch.int16) - 2 ** (grid.bits - 1)).to(torch.int8)


def _unsigned(codes: Tensor, grid: Grid) -> Tensor:
    return (codes.to(torch.int16) + 2 ** (grid.bits - 1)).to(torch.uint8)
