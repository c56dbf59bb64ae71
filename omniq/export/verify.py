# SPDX-License-Identifier: Apache-2.0
"""Reopen an exported folder and hold it against what was optimised.

1. Every code, scale and zero point is read back from the files and compared with the finished blocks, bit for bit, and
   so is every other parameter. Nothing may be missing and nothing may be there too much.
2. The folder is loaded through plain ``AutoModelForCausalLM.from_pretrained``, as a stranger would, and its logits are
   compared with those of the finished blocks put into the source's own modules and run one by one. That catches what
   the first step cannot: a config that describes the file wrongly, a runtime that computes something else.

The second step holds the whole loaded model in memory; leave ``windows`` out to skip it. It runs the same modules on the
same weights one window at a time, so the two agree exactly when the source was opened in the dtype of deployment.
Integer activations are switched off for it: it is the weights that are compared.
"""

import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

from omniq.export.checkpoint import Results, Source, deployed, each_result
from omniq.export.format import Format, Scheme
from omniq.export.registry import find_format
from omniq.export.shards import ShardReader, same_bits
from omniq.result import BlockResult, QuantizedLinear


class VerificationError(Exception):
    """The exported checkpoint is not the optimised model; the message names the first tensor that differs."""


class RunnableSource(Source, Protocol):
    """A source whose blocks can be run one by one."""

    dtype: torch.dtype

    def block(self, index: int, device: str = "cpu", dtype: torch.dtype | None = None) -> nn.Module:
        """A fresh block with its weights, in evaluation mode."""

    def embed(self, tokens: Tensor, device: str = "cpu") -> tuple[Tensor, list[dict[str, Any]]]:
        """Hidden states entering block 0, and the keyword arguments of every block."""

    def logits(self, hidden: Tensor, device: str = "cpu") -> Tensor:
        """Final norm and head."""


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
    """

    linears: int
    codes: int
    others: int
    windows: int = 0
    max_error: float = 0.0
    relative_error: float = 0.0


def verify_checkpoint(
    path: str | os.PathLike[str],
    source: RunnableSource,
    results: Results,
    *,
    format: str = "compressed-tensors",
    scheme: Scheme | None = None,
    windows: Tensor | None = None,
    tolerance: float = 1e-3,
) -> Report:
    """Compare an exported folder with the finished blocks it was made of.

    Args:
        path: the folder.
        source: the model that was exported; open it in the dtype of deployment if windows are given.
        results: as given to ``export_checkpoint``; if not a function, it must allow two passes.
        format, scheme: as given to ``export_checkpoint``.
        windows: int64 tokens ``[n, t]`` for the comparison of logits; None to leave that out.
        tolerance: largest relative error of the logits. Measured: 0.0 with float16, bfloat16 and float32 scales when
            the source is opened in the same dtype; a few 1e-3 when it is not.

    Raises:
        VerificationError: something differs; names the first tensor, or both errors of the logits.
    """
    path, layout = Path(path), find_format(format)
    report, scheme = _compare_tensors(path, source, results, layout, scheme)
    if windows is None:
        return report
    largest, relative = _compare_logits(path, source, results, windows, scheme.grid.scale_dtype)
    if not relative <= tolerance:  # NaN must not pass
        raise VerificationError(
            f"{path}: its weights are right, but its logits are off by {largest:.3g} at most and {relative:.3g} "
            f"relatively, more than {tolerance:.3g}"
        )
    return Report(report.linears, report.codes, report.others, len(windows), largest, relative)


def _compare_tensors(
    path: Path, source: Source, results: Results, layout: Format, scheme: Scheme | None
) -> tuple[Report, Scheme]:
    linears = codes = others = 0
    with ShardReader(path) as file:
        unseen = file.names
        for block, result in each_result(source, results):
            scheme = scheme or Scheme.of(result)
            for name, linear in result.linears.items():
                stored = file.under(f"{block}.{name}.")
                stored.pop(f"{block}.{name}.bias", None)  # a parameter beside the codes
                _compare_linear(f"{block}.{name}", _read(f"{block}.{name}", stored, layout, scheme), linear)
                unseen -= stored.keys()
                linears += 1
                codes += linear.codes.numel()
            for name, tensor in result.tensors.items():
                unseen -= _compare_plain(f"{block}.{name}", tensor, file, scheme)
                others += 1
        if scheme is None:
            raise VerificationError(f"{path}: there are no blocks to compare it with")
        for name, tensor in source.outside():
            unseen -= _compare_plain(name, tensor, file, scheme)
            others += 1
        for name in sorted(unseen):  # siblings of a new bias, which are zero
            if not name.endswith(".bias") or file[name].any():
                raise VerificationError(f"{name} is in the file but not in the model")
    return Report(linears, codes, others + len(unseen)), scheme


def _read(name: str, stored: dict[str, Tensor], layout: Format, scheme: Scheme) -> QuantizedLinear:
    try:
        return layout.read(name, stored, scheme)
    except KeyError as error:
        raise VerificationError(f"{name}.{error.args[0]} is missing in the file") from error
    except ValueError as error:
        raise VerificationError(f"{name} cannot be read back: {error}") from error


def _compare_linear(name: str, found: QuantizedLinear, expected: QuantizedLinear) -> None:
    for part in ("codes", "scale", "zero_point"):
        _compare(f"{name}: {part}", getattr(found, part), getattr(expected, part))


def _compare_plain(name: str, expected: Tensor, file: ShardReader, scheme: Scheme) -> set[str]:
    if name not in file.names:
        raise VerificationError(f"{name} is missing in the file")
    _compare(name, file[name], deployed(name, expected, scheme).cpu())
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
    was, wanted = found.flatten()[first].item(), expected.flatten()[first].item()
    raise VerificationError(f"{what} differ first at {where}: {was!r} in the file, {wanted!r} in the model")


@torch.no_grad()
def _compare_logits(
    path: Path, source: RunnableSource, results: Results, windows: Tensor, dtype: torch.dtype
) -> tuple[float, float]:
    """Largest difference, and root mean square difference over root mean square."""
    expected = _reference_logits(source, results, windows, dtype)
    model = AutoModelForCausalLM.from_pretrained(path).eval()
    for module in model.modules():
        module.quantization_enabled = False  # integer activations of compressed-tensors
    largest, difference, size = 0.0, 0.0, 0.0
    for window, reference in zip(windows, expected, strict=True):
        error = model(window[None], use_cache=False).logits.double() - reference
        largest = max(largest, float(error.abs().max()))
        difference += float(error.square().sum())
        size += float(reference.square().sum())
    return largest, (difference / size) ** 0.5


def _reference_logits(source: RunnableSource, results: Results, windows: Tensor, dtype: torch.dtype) -> list[Tensor]:
    """Float64 logits ``[1, t, vocab]`` of each window, one block in memory at a time."""
    hidden, arguments = source.embed(windows)
    states = list(hidden.to(dtype).split(1))
    for index, (_, result) in enumerate(each_result(source, results)):
        block = source.block(index, dtype=dtype)
        _install(block, result, dtype)
        kwargs = {key: _cast(value, dtype) for key, value in arguments[index].items()}
        for position, state in enumerate(states):
            output = block(state, **kwargs)
            states[position] = output[0] if isinstance(output, tuple) else output
    return [source.logits(state.to(source.dtype)).double() for state in states]


def _install(block: nn.Module, result: BlockResult, dtype: torch.dtype) -> None:
    """Put the parameters of a finished block into a module, biases that it never had included."""
    for name, tensor in result.dequantized(dtype).items():
        owner, _, leaf = name.rpartition(".")
        setattr(block.get_submodule(owner), leaf, nn.Parameter(tensor, requires_grad=False))


def _cast(value: Any, dtype: torch.dtype) -> Any:
    """Floating tensors of a keyword argument in another dtype, also inside tuples."""
    if isinstance(value, tuple):
        return tuple(_cast(item, dtype) for item in value)
    return value.to(dtype) if isinstance(value, Tensor) and value.is_floating_point() else value
