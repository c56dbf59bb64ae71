# SPDX-License-Identifier: Apache-2.0
"""Reopen an exported folder and compare it with the optimised model.

1. Every code, scale, zero point, outlier and other parameter is read back from the files and compared bit for bit with
   the finished blocks. Missing tensors and additional tensors are errors.
2. The folder is loaded with plain ``AutoModelForCausalLM.from_pretrained``, as a user would. Its logits are compared
   with those of the source's own architecture and config with the dequantized weights of the finished blocks, which run
   block by block (``omniq.export.verify.blockwise``). This detects errors that the first step cannot: a config that
   does not match the files, and a runtime that computes something else. Both sides run the same operations on the same
   values, so the logits are bitwise equal.

If this machine lacks the memory or the packages for the second step (``omniq.export.verify.reopened``), omniq runs the
folder block by block instead, which detects a wrong config but not a wrong runtime. Omit ``windows`` to skip the second
step. If activations are quantized too, it compares omniq's own hooks with the behaviour of transformers.
"""

import math
import os
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor, nn

from omniq.evaluate.perplexity import CHUNK, Perplexity
from omniq.export.check import check_format
from omniq.export.containers.container import Reader, Results, cast_for_export
from omniq.export.containers.shards import same_bits
from omniq.export.formats.codec import WrittenLinear
from omniq.export.registry import find_format
from omniq.export.restate import restated
from omniq.export.verify.blockwise import BlockwiseExport
from omniq.export.verify.reopened import ReopenedCheckpoint
from omniq.grid.scheme import Scheme
from omniq.models.source import SourceModel
from omniq.storage.block_result import QuantizedLinear


class VerificationError(Exception):
    """The exported checkpoint differs from the optimised model; the message names the first differing tensor."""


@dataclass(frozen=True)
class Report:
    """The result of a successful verification.

    Args:
        linears: number of quantized linears that were compared bit for bit.
        codes: number of their codes.
        others: number of other parameters that were compared bit for bit.
        windows: number of token windows whose logits were compared; 0 if this step was skipped.
        max_error: largest difference of a logit.
        relative_error: root mean square difference of the logits, divided by their root mean square.
        perplexity: perplexity of the windows, from the logits of the folder.
        lacking: the reason why transformers did not compute these logits; None if it did.
    """

    linears: int
    codes: int
    others: int
    windows: int = 0
    max_error: float = 0.0
    relative_error: float = 0.0
    perplexity: float = math.nan
    lacking: str | None = None


def verify_checkpoint(
    path: str | os.PathLike[str],
    source: SourceModel,
    results: Results,
    *,
    scheme: Scheme,
    format: str = "compressed-tensors",
    container_bits: int | None = None,
    windows: Tensor | None = None,
    tolerance: float | None = None,
    opened: ReopenedCheckpoint | None = None,
) -> Report:
    """Compare an exported checkpoint with the finished blocks from which it was written.

    Args:
        source, results, scheme, format, container_bits: as for ``export_checkpoint``.
        windows: int64 tokens ``[m, t]`` for the comparison of logits, on the host; None to skip this comparison.
        tolerance: largest relative error of the logits; by default that of the format (``omniq.export.registry``).
            Measured for compressed-tensors and omniq: 0.0 on SmolLM2-135M and the models of the tests.
        opened: the checkpoint in its runtime, if it is already open.

    Raises:
        VerificationError: a tensor or the logits differ; names the first tensor, or both errors of the logits.
        CorruptFile: a file of the checkpoint is missing or damaged.
    """
    path, chosen = Path(path), find_format(format)
    stored = check_format(format, scheme, source=source, container_bits=container_bits)
    if stored != scheme:
        scheme, results = stored, restated(source, results, stored)
    codec, container = chosen.codec(scheme), chosen.container
    tolerance = chosen.tolerance if tolerance is None else tolerance
    with container.read(path, codec) as reader:
        report, names = _compare_tensors(reader, source, results, scheme)
        if windows is None:
            return report
        opened = opened or ReopenedCheckpoint(path, container, codec)
        model = opened.model
        attention = (source if model is None else model).config._attn_implementation
        blockwise = BlockwiseExport(source, results, scheme, attention)
        found = blockwise.exported(reader, windows) if model is None else _logits(model, windows)
        largest, relative, perplexity = _compare_logits(found, blockwise.finished(names, windows), windows)
    if not relative <= tolerance:  # NaN must not pass
        raise VerificationError(
            f"{path}: its weights are correct, but its logits differ by up to {largest:.3g} (relative error "
            f"{relative:.3g}, tolerance {tolerance:.3g})"
        )
    report = replace(report, windows=len(windows), lacking=opened.lacking)
    return replace(report, max_error=largest, relative_error=relative, perplexity=perplexity)


def _compare_tensors(reader: Reader, source: SourceModel, results: Results, scheme: Scheme) -> tuple[Report, set[str]]:
    """Run the first step; also return the names of all compared parameters in the unquantized model."""
    linears: dict[str, WrittenLinear] = {}
    shapes: dict[str, torch.Size] = {}
    others = 0
    unseen = reader.names
    for index in range(source.num_blocks):
        block, result = source.block_name(index), results(index)
        for name, linear in result.linears.items():
            shapes[f"{block}.{name}.weight"] = linear.codes.shape
            _compare_linear(f"{block}.{name}", read_linear(reader, f"{block}.{name}"), reader.as_stored(linear))
            unseen -= reader.names_of(f"{block}.{name}")
            linears[f"{block}.{name}"] = WrittenLinear.of(linear)
        for name, tensor in result.tensors.items():
            shapes |= _compare_plain(f"{block}.{name}", tensor, reader, scheme)
            others += 1
    for name, tensor in source.outside():
        shapes |= _compare_plain(name, tensor, reader, scheme)
        others += 1
    unseen -= shapes.keys()
    for name in sorted(unseen):  # siblings of a new bias, which are zero
        if not name.endswith(".bias") or reader[name].any():
            raise VerificationError(f"{name} is in the files but not in the model")
    _compare_config(reader, shapes | {name: reader[name].shape for name in unseen})
    reader.check_description(linears)
    return Report(len(linears), sum(linear.weights for linear in linears.values()), others + len(unseen)), set(shapes)


def _compare_config(reader: Reader, shapes: Mapping[str, torch.Size]) -> None:
    """Make sure that the stock model of the config has exactly the compared parameters."""
    stock = reader.model
    found = {stock.tied.get(name, name): shape for name, shape in shapes.items()}
    for name in sorted(found.keys() | stock.parameters.keys()):
        ours, theirs = (list(side[name]) if name in side else None for side in (found, stock.parameters))
        if ours != theirs:
            raise VerificationError(f"{name} has shape {ours} in the model and {theirs} in the config of the export")


def read_linear(reader: Reader, name: str) -> QuantizedLinear:
    """A quantized linear of an export.

    Raises:
        VerificationError: a tensor is missing or impossible; names the linear.
        CorruptFile: a file is damaged.
    """
    try:
        return reader.read(name)
    except KeyError as error:
        raise VerificationError(f"{name}.{error.args[0]} is missing in the file") from error
    except (ValueError, TypeError, IndexError, RuntimeError) as error:  # shapes that do not match
        raise VerificationError(f"{name} cannot be read back: {error}") from error


def _compare_linear(name: str, found: QuantizedLinear, expected: QuantizedLinear) -> None:
    if found.grid != expected.grid:
        raise VerificationError(f"{name}: the grid is {found.grid} in the file, {expected.grid} in the model")
    for part in ("codes", "scale", "zero_point"):
        _compare(f"{name}: {part}", getattr(found, part), getattr(expected, part))
    for part, what in (("outliers", "outliers are"), ("input", "the range of its input is")):
        ours, theirs = getattr(found, part), getattr(expected, part)
        if ours is None or theirs is None:
            if ours is not theirs:
                raise VerificationError(f"{name}: {what} in the {'model' if ours is None else 'file'} only")
            continue
        for key, tensor in vars(theirs).items():
            _compare(f"{name}: {key} of {part}", getattr(ours, key), tensor)


def _compare_plain(name: str, expected: Tensor, reader: Reader, scheme: Scheme) -> dict[str, torch.Size]:
    if name not in reader.names:
        raise VerificationError(f"{name} is missing in the file")
    _compare(name, reader[name], cast_for_export(name, expected, scheme).cpu())
    return {name: expected.shape}


def _compare(what: str, found: Tensor, expected: Tensor) -> None:
    if same_bits(found, expected):
        return
    if found.dtype != expected.dtype or found.shape != expected.shape:
        was, wanted = (f"{tensor.dtype} {list(tensor.shape)}" for tensor in (found, expected))
        raise VerificationError(f"{what} is {was} in the file, {wanted} in the model")
    size = found.element_size()
    differ = found.contiguous().flatten().view(torch.uint8) != expected.contiguous().flatten().view(torch.uint8)
    first = int(differ.view(-1, size).any(1).nonzero()[0])
    where = [int(index) for index in torch.unravel_index(torch.tensor(first), found.shape)]
    values = [tensor.flatten()[first].item() for tensor in (found, expected)]
    raise VerificationError(f"{what} differ first at {where}: {values[0]} in the file, {values[1]} in the model")


def _compare_logits(found: Iterable[Tensor], expected: Iterable[Tensor], windows: Tensor) -> tuple[float, float, float]:
    """Largest difference, relative root mean square difference, and perplexity of the found logits."""
    largest = difference = size = 0.0
    metric = Perplexity(sync_on_compute=False)
    for ours, theirs, window in zip(found, expected, windows, strict=True):
        metric.update(ours, window[None])
        rows = max(1, CHUNK // ours.shape[-1])
        for left, right in zip(ours[0].split(rows), theirs[0].split(rows), strict=True):
            error, right = left.double() - right.double(), right.double()
            largest = max(largest, float(error.abs().max()))  # NaN is seen in the sums
            difference, size = difference + float(error.square().sum()), size + float(right.square().sum())
    return largest, (difference / (size or 1.0)) ** 0.5, metric.compute().item()


@torch.no_grad()
def _logits(model: nn.Module, windows: Tensor) -> Iterator[Tensor]:
    """Logits of each window, computed one window at a time, ``[1, t, v]``."""
    for window in windows:
        yield model(window[None], use_cache=False, return_dict=True).logits
