# SPDX-License-Identifier: Apache-2.0
"""The result of a finished block: integer codes, scales, zero points and all other parameters as exported.

The codes are authoritative: stages write them, packers rearrange their bits, and no step in between rounds again.
A result is one safetensors file. Its metadata holds the grids, a summary and a SHA-256 over all tensors.
"""

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from omniq.errors import CorruptFile
from omniq.grid.affine import Grid
from omniq.grid.dtypes import dtype_name
from omniq.grid.quantized_scales import QuantizedScales
from omniq.quantizers.activations import StaticGrid
from omniq.storage.sealed import NO_OWNER, Owner, load_tensors, save_tensors


@dataclass(frozen=True)
class Outliers:
    """The sparse float16 part of a layer, in compressed sparse rows. It is added to the dense part.

    Args:
        row_pointer: int32 ``[o + 1]``; row ``r`` owns entries ``row_pointer[r]:row_pointer[r + 1]``.
        column: ``[n]``, int16 if the layer has at most 32,768 inputs, else int32.
        value: float16 ``[n]``.
    """

    row_pointer: Tensor
    column: Tensor
    value: Tensor

    @classmethod
    def from_dense(cls, dense: Tensor) -> "Outliers":
        """Keep the non-zero entries of ``[o, i]``."""
        mask = dense != 0
        pointer = torch.zeros(dense.shape[0] + 1, dtype=torch.int32)
        pointer[1:] = mask.sum(1).cumsum(0).cpu()
        column = mask.nonzero()[:, 1].to(torch.int16 if dense.shape[1] <= 2**15 else torch.int32)
        return cls(pointer, column.cpu(), dense[mask].to(torch.float16).cpu())

    def dense(self, width: int, dtype: torch.dtype = torch.float32, device: str | torch.device | None = None) -> Tensor:
        """Make the dense tensor ``[o, i]``, on the device of ``value`` by default."""
        rows = self.row_pointer.diff().long()
        row = torch.arange(len(rows), device=rows.device).repeat_interleave(rows)
        out = torch.zeros(len(rows), width, dtype=dtype, device=device or self.value.device)
        out[row.to(out.device), self.column.to(out.device).long()] = self.value.to(out.device, dtype)
        return out


PARTS = ("codes", "scale", "zero_point")
# Attributes of a quantized linear that hold several tensors, with their types.
_NESTED: dict[str, type[Outliers] | type[StaticGrid]] = {"outliers": Outliers, "input": StaticGrid}


@dataclass(frozen=True)
class QuantizedLinear:
    """One linear layer on its grid.

    Args:
        grid: bits, group size, symmetry and the storage dtype of scales.
        codes: uint8 ``[o, i]``.
        scale: ``[o, G]`` in ``grid.scale_dtype``.
        zero_point: uint8 ``[o, G]``.
        outliers: the sparse part, if the method produces one.
        input: the grid of the input, if the scheme uses static ranges.
    """

    grid: Grid
    codes: Tensor
    scale: Tensor
    zero_point: Tensor
    outliers: Outliers | None = None
    input: StaticGrid | None = None

    def __post_init__(self) -> None:
        # A stage receives the result of an earlier stage in memory or, after a kill, from a file. Both must have the
        # same memory layout, because the order of summation in a product depends on strides.
        for name in PARTS:
            object.__setattr__(self, name, getattr(self, name).contiguous())

    @classmethod
    def of(
        cls, grid: Grid, codes: Tensor, scale: Tensor, zero_point: Tensor, outliers: Outliers | None = None
    ) -> "QuantizedLinear":
        """Convert codes, scales and zero points to their storage dtypes on the CPU."""
        return cls(
            grid,
            codes.to("cpu", torch.uint8),
            scale.to("cpu", grid.scale_dtype),
            zero_point.to("cpu", torch.uint8),
            outliers,
        )

    def to_state(self) -> dict[str, Any]:
        """Convert to plain containers and tensors, for a checkpoint."""
        nested = {key: getattr(self, key) for key in _NESTED}
        parts = {key: None if part is None else dict(vars(part)) for key, part in nested.items()}
        return {**vars(self), "grid": _grid_to_json(self.grid), **parts}

    @classmethod
    def from_state(cls, state: Mapping[str, Any]) -> "QuantizedLinear":
        """Invert ``to_state``."""
        parts = {key: None if state[key] is None else kind(**state[key]) for key, kind in _NESTED.items()}
        return cls(**{**state, "grid": _grid_from_json(state["grid"]), **parts})

    def dequantize(self, dtype: torch.dtype = torch.float32, device: str | torch.device | None = None) -> Tensor:
        """Compute the weight as a runtime does, ``[o, i]``, rounded once to ``dtype``: the same bits on every device.

        Args:
            dtype: dtype of the weight.
            device: device of the weight. The default is the device of the codes.
        """
        device = device or self.codes.device
        codes, scale, zero_point = (part.to(device) for part in (self.codes, self.scale, self.zero_point))
        weight = self.grid.dequantize(codes, scale.float(), zero_point)
        if self.outliers is not None:
            weight = weight + self.outliers.dense(weight.shape[1], device=device)
        return weight.to(dtype)

    def bits_per_weight(self) -> float:
        """Return the stored bits of codes, scales, zero points and outliers, divided by the number of weights."""
        grid, second = self.grid, self.grid.second or QuantizedScales(0, 0)
        bits = self.codes.numel() * grid.bits
        bits += second.stored_bits(self.scale, second.scale_bits, 8 * self.scale.element_size())
        if not grid.symmetric:
            bits += second.stored_bits(self.zero_point, second.zero_bits, grid.bits)
        if self.outliers is not None:
            parts = (self.outliers.row_pointer, self.outliers.column, self.outliers.value)
            bits += sum(part.numel() * part.element_size() * 8 for part in parts)
        return bits / self.codes.numel()


@dataclass(frozen=True)
class BlockResult:
    """The result of a finished block.

    Args:
        linears: the quantized linears, by name inside the block, such as ``self_attn.q_proj``.
        tensors: all other parameters of the block as exported (norms, biases), by name inside the block.
        summary: losses, warnings and seconds of the block.
    """

    linears: Mapping[str, QuantizedLinear]
    tensors: Mapping[str, Tensor]
    summary: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        # same memory layout as after a load, for the reason given in QuantizedLinear
        object.__setattr__(self, "tensors", {name: value.contiguous() for name, value in self.tensors.items()})

    def with_summary(self, **entries: Any) -> "BlockResult":
        """Return the result with additional entries in its summary."""
        return replace(self, summary={**self.summary, **entries})

    def with_tensors(self, tensors: Mapping[str, Tensor]) -> "BlockResult":
        """Return the result with other values for some tensors, by their names in the file of the result."""
        linears = {
            name: replace(
                linear, **{part: tensors.get(f"linears.{name}:{part}", getattr(linear, part)) for part in PARTS}
            )
            for name, linear in self.linears.items()
        }
        others = {name: tensors.get(f"tensors.{name}", value) for name, value in self.tensors.items()}
        return replace(self, linears=linears, tensors=others)

    def changed_from(self, other: "BlockResult") -> dict[str, Tensor]:
        """Return the tensors that differ from those of another result, by their names in the file of the result."""
        mine, theirs = self.tensors_by_name(), other.tensors_by_name()
        return {name: value for name, value in mine.items() if not torch.equal(value, theirs[name])}

    def tensors_by_name(self) -> dict[str, Tensor]:
        """Return all tensors except nested ones, by their names in the file of the result."""
        tensors = {f"tensors.{name}": tensor for name, tensor in self.tensors.items()}
        for name, linear in self.linears.items():
            tensors |= {f"linears.{name}:{part}": getattr(linear, part) for part in PARTS}
        return tensors

    def on_host(self) -> "BlockResult":
        """Return the result with all tensors in host memory, where the codes already are."""
        return replace(self, tensors={name: value.cpu() for name, value in self.tensors.items()})

    def with_inputs(self, grids: Mapping[str, StaticGrid]) -> "BlockResult":
        """Return the result with the grid of each linear's input."""
        linears = {name: replace(linear, input=grids[name]) for name, linear in self.linears.items()}
        return replace(self, linears=linears)

    def dequantized(
        self, dtype: torch.dtype = torch.float32, device: str | torch.device = "cpu"
    ) -> Iterator[tuple[str, Tensor]]:
        """Yield all parameters of the block, dequantized, as the items of a state dict."""
        for name, linear in self.linears.items():
            yield f"{name}.weight", linear.dequantize(dtype, device)
        for name, tensor in self.tensors.items():
            yield name, tensor.to(device, dtype)

    def first_unstorable(self, dtype: torch.dtype) -> str | None:
        """Return the first parameter whose values are not finite in the export dtype; None if all values are finite."""
        ranges = {
            f"{name}.weight": linear.scale.float() * linear.grid.max_code for name, linear in self.linears.items()
        }
        values = {**ranges, **self.tensors}
        return next((name for name, value in values.items() if not value.to(dtype).isfinite().all()), None)

    def save(self, path: Path, owner: Owner = NO_OWNER) -> None:
        """Write the result to ``path`` atomically."""
        tensors = self.tensors_by_name()
        grids = {name: _grid_to_json(linear.grid) for name, linear in self.linears.items()}
        for name, linear in self.linears.items():
            for part in _NESTED:
                if (nested := getattr(linear, part)) is not None:
                    tensors |= {f"linears.{name}:{part}.{key}": value for key, value in vars(nested).items()}
        save_tensors(path, tensors, {"grids": json.dumps(grids), "summary": json.dumps(dict(self.summary))}, owner)

    @classmethod
    def load(cls, path: Path, owner: Owner | None = None) -> "BlockResult":
        """Read what ``save`` wrote.

        Args:
            path: the file.
            owner: the required owner of the file. By default any owner is accepted.

        Raises:
            CorruptFile: the file is truncated or altered, is not a block result, or belongs to another owner.
        """
        tensors, head = load_tensors(path, owner)
        if not {"grids", "summary"} <= head.keys():
            raise CorruptFile(f"{path}: the file is not a block result")
        linears: dict[str, QuantizedLinear] = {}
        for name, grid in json.loads(head["grids"]).items():
            prefix = f"linears.{name}:"
            part: dict[str, Any] = {key.removeprefix(prefix): tensors[key] for key in tensors if key.startswith(prefix)}
            for key, kind in _NESTED.items():
                fields = {
                    last.removeprefix(f"{key}."): part.pop(last) for last in list(part) if last.startswith(f"{key}.")
                }
                part[key] = kind(**fields) if fields else None
            linears[name] = QuantizedLinear(_grid_from_json(grid), **part)
        others = {key.removeprefix("tensors."): value for key, value in tensors.items() if key.startswith("tensors.")}
        return cls(linears, others, json.loads(head["summary"]))


def _grid_to_json(grid: Grid) -> dict[str, Any]:
    second = None if grid.second is None else vars(grid.second)
    found = vars(grid) | {"scale_dtype": dtype_name(grid.scale_dtype), "second": second}
    defaults = {"zero_points": "any", "scale_bits": None}  # earlier versions do not know these keys
    return {key: value for key, value in found.items() if key not in defaults or value != defaults[key]}


def _grid_from_json(grid: dict[str, Any]) -> Grid:
    # Results of earlier versions lack the key "second".
    second = QuantizedScales(**grid["second"]) if grid.get("second") else None
    return Grid(**{**grid, "scale_dtype": getattr(torch, grid["scale_dtype"]), "second": second})
