# SPDX-License-Identifier: Apache-2.0
"""Reopen an exported folder and hold it against what was optimised.

1. Every code, scale, zero point and outlier is read back from the files and compared with the finished blocks, bit for
   bit, and so is every other parameter. Nothing may be missing and nothing may be there too much.
2. The folder is loaded through plain ``AutoModelForCausalLM.from_pretrained``, as a stranger would, and its logits are
   compared with those of the source's own architecture and config on the dequantized weights of the finished blocks,
   which run block by block (``omniq.export.verify.blockwise``). That catches what the first step cannot: a config that
   describes the file wrongly, a runtime that computes something else. Both make the same operations on the same
   numbers, so the logits agree to the bit.

Where the host has not the memory for the second step (``omniq.export.verify.reopened``), what lies in the folder runs
block by block as well: that catches a wrong config, not a wrong runtime. Leave ``windows`` out to skip it. Where
activations are quantized too, it holds omniq's own hooks against what transformers makes of the folder.
"""

import math
import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor, nn

from omniq.evaluate.perplexity import CHUNK, Perplexity
from omniq.export.containers.huggingface import Results, cast_for_export, each_result
from omniq.export.containers.shards import ShardReader, same_bits
from omniq.export.formats.format import Format, scheme_of
from omniq.export.formats.registry import find_format
from omniq.export.verify.blockwise import BlockwiseExport, read_linear, stored_of
from omniq.export.verify.reopened import ReopenedCheckpoint
from omniq.grid.affine import Grid
from omniq.grid.scheme import Scheme
from omniq.models.source import SourceModel
from omniq.storage.block_result import QuantizedLinear


class VerificationError(Exception):
    """The exported checkpoint is not the optimised model; the message names the first tensor that differs."""


@dataclass(frozen=True)
class Report:
    """What was compared and found equal.

    Args:
        linears: quantized linears compared bit for bit.
        codes: codes in them.
        others: other parameters compared bit for bit.
        windows: token windows whose logits were compared; 0 if that was left out.
        max_error: largest difference of a logit.
        relative_error: root mean square difference of logits over their root mean square.
        perplexity: of the windows, by the logits of the folder.
        lacking: why it was not opened in transformers, which was to give them; None if it was.
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
    format: str = "compressed-tensors",
    scheme: Scheme | None = None,
    windows: Tensor | None = None,
    tolerance: float = 1e-4,
    opened: ReopenedCheckpoint | None = None,
) -> Report:
    """Compare an exported folder with the finished blocks it was made of.

    Args:
        path: the folder.
        source: the model that was exported.
        results: as given to ``export_checkpoint``; if not a function, it must allow several passes.
        format, scheme: as given to ``export_checkpoint``.
        windows: int64 tokens ``[m, t]`` for the comparison of logits, on the host; None to leave that out.
        tolerance: largest relative error of the logits. Measured on SmolLM2-135M and on the tiny models of the tests,
            symmetric and not, scales in float16, bfloat16 and float32: 0.0.
        opened: the folder in transformers, if it is needed for something else as well.

    Raises:
        VerificationError: something differs; names the first tensor, or both errors of the logits.
        CorruptFile: a file of the folder is missing or damaged; names it.
    """
    path, layout = Path(path), find_format(format)
    report, scheme, names = _compare_tensors(path, source, results, layout, scheme)
    if windows is None:
        return report
    opened = opened or ReopenedCheckpoint(path, layout)
    model = opened.model
    plain = BlockwiseExport(source, results, scheme, (source if model is None else model).config._attn_implementation)
    found = plain.exported(path, layout, windows) if model is None else _logits(model, windows)
    largest, relative, perplexity = _compare_logits(found, plain.finished(names, windows), windows)
    if not relative <= tolerance:  # NaN must not pass
        raise VerificationError(
            f"{path}: its weights are right, but its logits are off by {largest:.3g} at most and {relative:.3g} "
            f"relatively, more than {tolerance:.3g}"
        )
    return replace(
        report,
        windows=len(windows),
        max_error=largest,
        relative_error=relative,
        perplexity=perplexity,
        lacking=opened.lacking,
    )


def _compare_tensors(
    path: Path, source: SourceModel, results: Results, layout: Format, scheme: Scheme | None
) -> tuple[Report, Scheme, set[str]]:
    """The first step; also the scheme, and the names that a plain model has for what was compared."""
    linears = codes = others = 0
    names: set[str] = set()
    with ShardReader(path) as file:
        unseen = file.names
        for block, result in each_result(source, results):
            scheme = scheme or scheme_of(result)
            for name, linear in result.linears.items():
                names.add(f"{block}.{name}.weight")
                stored = stored_of(file, f"{block}.{name}")
                found = _read(f"{block}.{name}", stored, layout, scheme, linear.grid)
                _compare_linear(f"{block}.{name}", found, linear)
                unseen -= stored.keys()
                linears += 1
                codes += linear.codes.numel()
            for name, tensor in result.tensors.items():
                names |= _compare_plain(f"{block}.{name}", tensor, file, scheme)
                others += 1
        if scheme is None:
            raise VerificationError(f"{path}: there are no blocks to compare it with")
        for name, tensor in source.outside():
            names |= _compare_plain(name, tensor, file, scheme)
            others += 1
        unseen -= names
        for name in sorted(unseen):  # siblings of a new bias, which are zero
            if not name.endswith(".bias") or file[name].any():
                raise VerificationError(f"{name} is in the file but not in the model")
    return Report(linears, codes, others + len(unseen)), scheme, names


def _read(name: str, stored: dict[str, Tensor], layout: Format, scheme: Scheme, grid: Grid) -> QuantizedLinear:
    try:
        return read_linear(name, stored, layout, scheme, grid)
    except KeyError as error:
        raise VerificationError(f"{name}.{error.args[0]} is missing in the file") from error
    except ValueError as error:
        raise VerificationError(f"{name} cannot be read back: {error}") from error


def _compare_linear(name: str, found: QuantizedLinear, expected: QuantizedLinear) -> None:
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


def _compare_plain(name: str, expected: Tensor, file: ShardReader, scheme: Scheme) -> set[str]:
    if name not in file.names:
        raise VerificationError(f"{name} is missing in the file")
    _compare(name, file[name], cast_for_export(name, expected, scheme).cpu())
    return {name}


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
    """Largest difference, root mean square difference over root mean square, and perplexity of what was found."""
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
    """Of each window by itself, ``[1, t, v]``."""
    for window in windows:
        yield model(window[None], use_cache=False, return_dict=True).logits
