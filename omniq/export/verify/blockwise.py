# SPDX-License-Identifier: Apache-2.0
"""Runs the exported model block by block, in two ways: from the finished blocks, and from the files of an export.

Both are stock models in the export dtype, with one block in memory at a time. They differ in the source of config and
weights:

    finished    the config of the source model, with the bias switches that the blocks need; dequantized codes of the
                finished blocks, and all other parameters of the source model
    exported    the config in the folder; codes and parameters from its files

On every window, they compute the same operations as transformers with the whole model.

Shapes: ``m`` windows, ``t`` tokens of a window, ``v`` vocabulary.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import lru_cache
from pathlib import Path

import torch
from torch import Tensor, nn

from omniq.blocks.activation_hooks import attach
from omniq.blocks.grids import scheme_layout
from omniq.evaluate.streaming import stream_logits
from omniq.export.containers.container import Reader, Results
from omniq.export.containers.target_model import TargetModel, target_model
from omniq.grid.dtypes import dtype_name
from omniq.grid.scheme import Scheme
from omniq.models.checkpoint import Checkpoint, Stored
from omniq.models.meta import meta_model
from omniq.models.source import SourceModel
from omniq.storage.block_result import QuantizedLinear

Linear = Callable[[str, QuantizedLinear], QuantizedLinear]
"""Maps the full name of a linear and its finished result to the linear that the model uses."""

Plain = Callable[[str], Tensor | None]
"""Returns any other parameter by full name; None for a bias that exists only because its siblings have one."""


class Parts(Checkpoint):
    """Parameters of a stock model by name, each created when it is read.

    Args:
        model: the stock model.
        dtype: dtype of the parameters.
        part: creates the parameter of a name.
    """

    def __init__(self, model: TargetModel, dtype: torch.dtype, part: Callable[[str], Tensor]) -> None:
        kind = dtype_name(dtype)
        super().__init__({name: Stored(tuple(shape), kind, Path()) for name, shape in model.parameters.items()}, [])
        self._part = part

    def read(self, names: Iterable[str]) -> dict[str, Tensor]:
        return {name: self._part(name) for name in names}


class BlockwiseExport:
    """Runs a model whose blocks are finished.

    Args:
        source: the exported model: the location of its blocks, and all parameters outside them.
        results: finished blocks, as for ``export_checkpoint``.
        scheme: the quantization of activations and the export dtype.
        attention: the attention implementation of transformers.
    """

    def __init__(self, source: SourceModel, results: Results, scheme: Scheme, attention: str) -> None:
        self._source, self._scheme, self._attention = source, scheme, attention
        self._result = lru_cache(maxsize=1)(results)

    def finished(self, names: Iterable[str], windows: Tensor) -> Iterator[Tensor]:
        """Logits ``[1, t, v]`` of each window, computed from the finished blocks; reads no exported folder.

        Args:
            names: names of all parameters of the unquantized model.
            windows: int64 ``[m, t]``.
        """

        def plain(name: str) -> Tensor | None:
            index, inner = self._find(name)
            if index is not None:
                return self._result(index).tensors.get(inner)
            return next((value for key, value in self._source.outside() if key == name), None)

        return self._run(target_model(self._source.config, names), lambda _, linear: linear, plain, windows)

    def exported(self, reader: Reader, windows: Tensor) -> Iterator[Tensor]:
        """Logits ``[1, t, v]`` of each window, computed from an exported checkpoint that omniq reads."""
        return self._run(reader.model, lambda name, _: reader.read(name), reader.__getitem__, windows)

    def _run(self, model: TargetModel, linear: Linear, plain: Plain, windows: Tensor) -> Iterator[Tensor]:
        dtype = self._scheme.export_dtype

        def part(name: str) -> Tensor:
            index, inner = self._find(name)
            linears: Mapping[str, QuantizedLinear] = {} if index is None else self._result(index).linears
            found = linears.get(inner.removesuffix(".weight")) if inner.endswith(".weight") else None
            if found is not None:
                return linear(name.removesuffix(".weight"), found).dequantize(dtype)
            value = plain(name)
            if value is None:
                return torch.zeros(model.parameters[name], dtype=dtype)
            return value.to(torch.float32 if self._source.keeps_float32(name) else dtype)

        def quantized(index: int, block: nn.Module) -> nn.Module:
            layout = scheme_layout(self._source, self._scheme, index)
            attach(block, layout, self._scheme.activations, self._result(index).linears)
            return block

        stock = meta_model(model.config, dtype, self._attention)
        assembled = SourceModel.of(stock, Parts(model, dtype, part), self._source.folder)
        return (logits for _, logits, _ in stream_logits(assembled, windows, {"deployed": quantized}))

    def _find(self, name: str) -> tuple[int | None, str]:
        """Index of the block of a parameter, and its name inside the block; None if it is outside the blocks."""
        prefix = f"{self._source.family.blocks}."
        if not name.startswith(prefix):
            return None, name
        number, _, inner = name.removeprefix(prefix).partition(".")
        return int(number), inner
