# SPDX-License-Identifier: Apache-2.0
"""The compressed-tensors format: what transformers, vLLM and SGLang read with one small package.

Two layouts, chosen by the scheme. ``q`` and ``z`` are omniq's codes and zero points in ``[0, 2^b - 1]``, and
``u = 2^(b-1)``:

``pack-quantized`` for weight-only models:
    weight_packed      int32 [o, ceil(i b / 32)]   q, a dense bitstream along the inputs
    weight_scale       [o, G]                      s, in the dtype of deployment
    weight_zero_point  int32 [ceil(o b / 32), G]   z, a dense bitstream along the outputs; asymmetric only
    weight_shape       int64 [2]                   o, i

``int-quantized`` for models whose activations are integers too:
    weight             int8 [o, i]                 q - u
    weight_scale       [o, G]                      s
    weight_zero_point  int8 [o, G]                 z - u; asymmetric only
    input_scale        [1]                         of the linear's input, where one range is fixed for all tokens
    input_zero_point   int8 [1]                    signed; asymmetric activations only

The runtime computes ``(q - z) * s`` in the dtype of ``s``: integers up to 255 are exact there and the product is
rounded once, so the result is ``QuantizedLinear.dequantize`` to the bit as long as the model runs in that dtype.

Four traps, all met in transformers 5.23:

* Asymmetric ``pack-quantized`` files fail to load by default (the zero point is expected unpacked). The key
  ``dequantize: true`` in ``config.json`` makes plain ``from_pretrained`` unpack them while loading; readers that do not
  know it ignore it. It drops integer activations, so ``int-quantized`` files never carry it.
* That loading path reads one scheme for the whole model. Models with several grids would load silently wrong, hence one
  grid per model.
* Where each token has its own range, an input of two dimensions gets one range for all of it. OPT flattens samples and
  tokens before its MLP; such a family needs fixed ranges, and is refused without.
* ``format`` must also stand inside the group, or the layout is inferred from the presence of activations.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from omniq.errors import UserError
from omniq.export.formats.format import Written, check_scheme
from omniq.export.formats.packing import pack, unpack
from omniq.grid.affine import Grid
from omniq.grid.scheme import Scheme
from omniq.models.layout import Layout
from omniq.quantizers.activations import StaticGrid
from omniq.storage.block_result import QuantizedLinear


class PackQuantized:
    """Codes as a dense bitstream."""

    name = "pack-quantized"

    def store(self, linear: QuantizedLinear) -> dict[str, Tensor]:
        """The tensors of one linear by their last name."""
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
    """Codes as signed bytes, whatever their bits.

    Args:
        input_symmetric: no zero points of inputs are stored.
    """

    name = "int-quantized"

    def __init__(self, input_symmetric: bool) -> None:
        self.input_symmetric = input_symmetric

    def store(self, linear: QuantizedLinear) -> dict[str, Tensor]:
        """The tensors of one linear by their last name."""
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
    """``pack-quantized`` where only weights are integers, ``int-quantized`` where activations are too."""

    name = "compressed-tensors"
    requires: tuple[str, ...] = ("compressed-tensors>=0.18",)  # older ones read other numbers from 3, 5, 6 and 7 bits
    stays_packed = False

    def layout(self, scheme: Scheme) -> PackQuantized | IntQuantized:
        """The layout that the scheme asks for."""
        return PackQuantized() if scheme.activation_bits == 16 else IntQuantized(scheme.activation_symmetric)

    def check(self, scheme: Scheme, layouts: Sequence[Layout] = (), outliers: bool = False) -> None:
        """Refuse outliers, several grids, quantized queries, keys and values, flat inputs with A8, and odd dtypes.

        Raises:
            UserError: names the scheme and what would fit.
        """
        problem, flat = "", next((layout for layout in layouts if layout.flat), None)
        if outliers:
            problem = (
                "has no place for the sparse outliers or second-level scales of this method: use format omniq, or a "
                "method without them"
            )
        elif scheme.kv_bits != 16:
            problem = f"cannot hold a dynamic KV cache of {scheme.kv_bits} bits: use KV16, or format omniq"
        elif scheme.activation_bits != 16 and not scheme.activations.static and flat is not None:
            problem = (
                f"would give all tokens one range in {', '.join(flat.flat)} of {flat.model_type} when "
                "transformers runs it, so the checkpoint would not be the optimised model: set "
                "scheme.activation_range to tensor, use format omniq, or use A16"
            )
        elif len(scheme.grids) > 1:
            problem = (
                "holds one grid for the whole model and scheme.rules give several: use format omniq, or only rules "
                "with the name none"
            )
        elif scheme.queries:
            problem = "cannot hold quantized queries: set scheme.queries to false, or use format omniq"
        check_scheme(scheme, self.name, problem)

    def code_bits(self, grid: Grid, scheme: Scheme) -> int:
        """Bits that a code on this grid takes on disk: a byte where activations are integers too."""
        return grid.bits if scheme.activation_bits == 16 else 8

    def tensors(self, name: str, linear: QuantizedLinear, scheme: Scheme) -> dict[str, Tensor]:
        """What is stored for one linear, by full name.

        Raises:
            UserError: the linear has outliers, or is on another grid than the model.
            ValueError: a symmetric linear whose zero point is not the middle of the code range, or a linear without the
                range of its input that the scheme fixes.
        """
        if linear.outliers is not None:
            raise UserError(f"{name} has outliers: format {self.name} has no place for them; use format omniq")
        if linear.grid != scheme.grid:
            raise UserError(
                f"{name} is on {linear.grid}, the model on {scheme.grid}: format {self.name} holds one grid; "
                "use format omniq"
            )
        if linear.grid.symmetric and bool((linear.zero_point != _middle(linear.scale, linear.grid)).any()):
            raise ValueError(f"{name}: the zero point of a symmetric grid is not {2 ** (linear.grid.bits - 1)}")
        if scheme.activations.static and linear.input is None:
            raise ValueError(f"{name}: the scheme fixes the range of its input, and it has none")
        return {f"{name}.{key}": tensor for key, tensor in self.layout(scheme).store(linear).items()}

    def read(self, name: str, tensors: Mapping[str, Tensor], scheme: Scheme) -> QuantizedLinear:
        """Invert ``tensors``."""
        prefix = f"{name}."
        stored = {key.removeprefix(prefix): tensor for key, tensor in tensors.items() if key.startswith(prefix)}
        return self.layout(scheme).load(stored, scheme.grid)

    def quantization_config(
        self, scheme: Scheme, ignore: Sequence[str], linears: Mapping[str, Written]
    ) -> dict[str, Any]:
        """The entry of ``config.json``; see the module's text for its traps."""
        layout, grid = self.layout(scheme).name, scheme.grid
        weights = {
            "num_bits": grid.bits,
            "type": "int",
            "symmetric": grid.symmetric,
            "strategy": "channel" if grid.group_size == -1 else "group",
            "group_size": None if grid.group_size == -1 else grid.group_size,
            "dynamic": False,
        }
        group = {
            "targets": ["Linear"],
            "format": layout,
            "weights": weights,
            "input_activations": _activations(scheme),
            "output_activations": None,
        }
        config = {
            "quant_method": "compressed-tensors",
            "format": layout,
            "quantization_status": "compressed",
            "ignore": list(ignore),
            "kv_cache_scheme": None,
            "config_groups": {"group_0": group},
        }
        return config | ({"dequantize": True} if scheme.activation_bits == 16 and not grid.symmetric else {})


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
    """The zero points of a symmetric grid, uint8 like ``scale``."""
    return torch.full_like(scale, 2 ** (grid.bits - 1), dtype=torch.uint8)


def _signed(codes: Tensor, grid: Grid) -> Tensor:
    return (codes.to(torch.int16) - 2 ** (grid.bits - 1)).to(torch.int8)


def _unsigned(codes: Tensor, grid: Grid) -> Tensor:
    return (codes.to(torch.int16) + 2 ** (grid.bits - 1)).to(torch.uint8)
