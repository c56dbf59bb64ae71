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

The runtime computes ``(q - z) * s`` in the dtype of ``s``: integers up to 255 are exact there and the product is
rounded once, so the result is ``QuantizedLinear.dequantize`` to the bit as long as the model runs in that dtype.

Four traps, all met in transformers 5.23:

* Asymmetric ``pack-quantized`` files fail to load by default (the zero point is expected unpacked). The key
  ``dequantize: true`` in ``config.json`` makes plain ``from_pretrained`` unpack them while loading; readers that do not
  know it ignore it. It drops integer activations, so ``int-quantized`` files never carry it.
* That loading path reads one scheme for the whole model. Models with several grids would load silently wrong, hence one
  grid per model.
* Activations are quantized for each token, but an input of two dimensions gets one range for all of it. OPT flattens
  samples and tokens before its MLP; models of such a family are refused with integer activations.
* ``format`` must also stand inside the group, or the layout is inferred from the presence of activations.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from omniq.errors import UserError
from omniq.export.format import Written
from omniq.export.packing import pack, unpack
from omniq.models.family import Family
from omniq.quantizers.grid import Grid
from omniq.quantizers.scheme import Scheme
from omniq.result import QuantizedLinear

_SCALE_DTYPES = (torch.float16, torch.bfloat16, torch.float32)


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
    """Codes as signed bytes, whatever their bits."""

    name = "int-quantized"

    def store(self, linear: QuantizedLinear) -> dict[str, Tensor]:
        """The tensors of one linear by their last name."""
        stored = {"weight": _signed(linear.codes, linear.grid), "weight_scale": linear.scale}
        if not linear.grid.symmetric:
            stored["weight_zero_point"] = _signed(linear.zero_point, linear.grid)
        return stored

    def load(self, stored: Mapping[str, Tensor], grid: Grid) -> QuantizedLinear:
        """Invert ``store``."""
        codes, scale = _unsigned(stored["weight"], grid), stored["weight_scale"]
        zero_point = _middle(scale, grid) if grid.symmetric else _unsigned(stored["weight_zero_point"], grid)
        return QuantizedLinear(grid, codes, scale, zero_point)


class CompressedTensors:
    """``pack-quantized`` where only weights are integers, ``int-quantized`` where activations are too."""

    name = "compressed-tensors"
    requires: tuple[str, ...] = ("compressed-tensors",)

    def layout(self, scheme: Scheme) -> PackQuantized | IntQuantized:
        """The layout that the scheme asks for."""
        return PackQuantized() if scheme.activation_bits == 16 else IntQuantized()

    def check(self, scheme: Scheme, family: Family | None = None, outliers: bool = False) -> None:
        """Refuse outliers, quantized queries, keys and values, flat inputs with integer activations, and odd dtypes.

        Raises:
            UserError: names the scheme and what would fit.
        """
        problem = ""
        if outliers:
            problem = (
                "has no place for the sparse outliers of this method: use format omniq, or a method without outliers"
            )
        elif scheme.kv_bits != 16:
            problem = f"cannot hold a dynamic KV cache of {scheme.kv_bits} bits: use KV16"
        elif scheme.activation_bits != 16 and family is not None and family.flat:
            problem = (
                f"would give all tokens one range in {', '.join(family.flat)} of {', '.join(family.model_types)} when "
                "transformers runs it, so the checkpoint would not be the optimised model: use A16, or set "
                "export.format to none"
            )
        elif scheme.queries:
            problem = "cannot hold quantized queries: set scheme.queries to false"
        elif scheme.grid.scale_dtype not in _SCALE_DTYPES:
            problem = f"cannot hold scales in {scheme.grid.scale_dtype}: use float16, bfloat16 or float32"
        if problem:
            raise UserError(f"scheme {scheme.name}: format {self.name} {problem}")

    def tensors(self, name: str, linear: QuantizedLinear, scheme: Scheme) -> dict[str, Tensor]:
        """What is stored for one linear, by full name.

        Raises:
            UserError: the linear has outliers, or is on another grid than the model.
            ValueError: a symmetric linear whose zero point is not the middle of the code range.
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
    symmetric = scheme.activation_symmetric
    return {
        "num_bits": scheme.activation_bits,
        "type": "int",
        "symmetric": symmetric,
        "strategy": "token",
        "dynamic": True,
    }


def _middle(scale: Tensor, grid: Grid) -> Tensor:
    """The zero points of a symmetric grid, uint8 like ``scale``."""
    return torch.full_like(scale, 2 ** (grid.bits - 1), dtype=torch.uint8)


def _signed(codes: Tensor, grid: Grid) -> Tensor:
    return (codes.to(torch.int16) - 2 ** (grid.bits - 1)).to(torch.int8)


def _unsigned(codes: Tensor, grid: Grid) -> Tensor:
    return (codes.to(torch.int16) + 2 ** (grid.bits - 1)).to(torch.uint8)
