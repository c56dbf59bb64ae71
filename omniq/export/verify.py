# SPDX-License-Identifier: Apache-2.0
"""Reopen an exported folder and hold it against what was optimised.

1. Every code, scale, zero point and outlier is read back from the files and compared with the finished blocks, bit for
   bit, and so is every other parameter. Nothing may be missing and nothing may be there too much.
2. The folder is loaded through plain ``AutoModelForCausalLM.from_pretrained``, as a stranger would, and its logits are
   compared with those of the source's own architecture and config on the dequantized weights of the finished blocks.
   That catches what the first step cannot: a config that describes the file wrongly, a runtime that computes something
   else. Both run the same modules on the same numbers, so the logits agree to the bit.

The second step holds a whole model in memory, one after the other; leave ``windows`` out to skip it. Where activations
are quantized too, it holds omniq's own hooks against what transformers makes of the folder.
"""

import os
from dataclasses import dataclass, replace
from pathlib import Path

import torch
import transformers
from torch import Tensor, nn
from transformers import PreTrainedModel

from omniq.export.checkpoint import Results, Source, deployed, each_result
from omniq.export.deployment import deployment
from omniq.export.format import Format, scheme_of
from omniq.export.registry import find_format
from omniq.export.shards import ShardReader, same_bits
from omniq.models.reload import open_checkpoint
from omniq.quantizers.grid import Grid
from omniq.quantizers.hooks import attach_all
from omniq.quantizers.scheme import Scheme
from omniq.result import QuantizedLinear


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
    """

    linears: int
    codes: int
    others: int
    windows: int = 0
    max_error: float = 0.0
    relative_error: float = 0.0


def verify_checkpoint(
    path: str | os.PathLike[str],
    source: Source,
    results: Results,
    *,
    format: str = "compressed-tensors",
    scheme: Scheme | None = None,
    windows: Tensor | None = None,
    tolerance: float = 1e-4,
    device: str = "cpu",
) -> Report:
    """Compare an exported folder with the finished blocks it was made of.

    Args:
        path: the folder.
        source: the model that was exported.
        results: as given to ``export_checkpoint``; if not a function, it must allow several passes.
        format, scheme: as given to ``export_checkpoint``.
        windows: int64 tokens ``[n, t]`` for the comparison of logits; None to leave that out.
        tolerance: largest relative error of the logits. Measured on SmolLM2-135M and on the tiny models of the tests,
            symmetric and not, scales in float16, bfloat16 and float32: 0.0.
        device: where the models run for the logits.

    Raises:
        VerificationError: something differs; names the first tensor, or both errors of the logits.
        CorruptFile: a file of the folder is missing or damaged; names it.
    """
    path, layout = Path(path), find_format(format)
    report, scheme = _compare_tensors(path, source, results, layout, scheme)
    if windows is None:
        return report
    largest, relative = _compare_logits(path, source, results, windows, device, scheme)
    if not relative <= tolerance:  # NaN must not pass
        raise VerificationError(
            f"{path}: its weights are right, but its logits are off by {largest:.3g} at most and {relative:.3g} "
            f"relatively, more than {tolerance:.3g}"
        )
    return replace(report, windows=len(windows), max_error=largest, relative_error=relative)


def _compare_tensors(
    path: Path, source: Source, results: Results, layout: Format, scheme: Scheme | None
) -> tuple[Report, Scheme]:
    linears = codes = others = 0
    with ShardReader(path) as file:
        unseen = file.names
        for block, result in each_result(source, results):
            scheme = scheme or scheme_of(result)
            for name, linear in result.linears.items():
                stored = file.under(f"{block}.{name}.")
                stored.pop(f"{block}.{name}.bias", None)  # a parameter beside the codes
                found = _read(f"{block}.{name}", stored, layout, scheme, linear.grid)
                _compare_linear(f"{block}.{name}", found, linear)
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


def _read(name: str, stored: dict[str, Tensor], layout: Format, scheme: Scheme, grid: Grid) -> QuantizedLinear:
    own = Scheme.of(
        grid,
        scheme.activation_bits,
        scheme.activation_symmetric,
        scheme.kv_bits,
        scheme.queries,
        scheme.activation_range,
    )
    try:
        return layout.read(name, stored, own)
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
    values = [tensor.flatten()[first].item() for tensor in (found, expected)]
    raise VerificationError(f"{what} differ first at {where}: {values[0]} in the file, {values[1]} in the model")


def _compare_logits(
    path: Path,
    source: Source,
    results: Results,
    windows: Tensor,
    device: str,
    scheme: Scheme,
) -> tuple[float, float]:
    """Largest difference, and root mean square difference over root mean square."""
    model = open_checkpoint(path)
    attention = model.config._attn_implementation
    found = _logits(model, windows, device)
    del model
    plain = _dequantized_model(source, results, scheme.grid.scale_dtype, attention)
    finished = ((plain.get_submodule(block), result.linears) for block, result in each_result(source, results))
    attach_all(finished, source.family, scheme.activations)
    expected = _logits(plain, windows, device)
    pairs = [(left.double(), right.double()) for left, right in zip(found, expected, strict=True)]
    difference = sum(float((left - right).square().sum()) for left, right in pairs)
    size = sum(float(right.square().sum()) for _, right in pairs)
    return max(float((left - right).abs().max()) for left, right in pairs), (difference / size) ** 0.5


@torch.no_grad()
def _logits(model: nn.Module, windows: Tensor, device: str) -> list[Tensor]:
    """Of each window by itself, ``[1, t, vocab]``, on the CPU."""
    model.to(device).eval()
    return [model(window[None].to(device), use_cache=False).logits.cpu() for window in windows]


def _dequantized_model(source: Source, results: Results, dtype: torch.dtype, attention: str) -> PreTrainedModel:
    """The source's architecture with the finished blocks, nothing of it read from the exported folder."""
    state = {name: tensor.to(dtype) for name, tensor in source.outside()}
    for block, result in each_result(source, results):
        state |= {f"{block}.{name}": tensor for name, tensor in result.dequantized(dtype).items()}
    model = deployment(source.config, state)
    state |= {name: torch.zeros(shape, dtype=dtype) for name, shape in model.biases_without_value(state).items()}
    architecture: type[PreTrainedModel] = getattr(transformers, model.architecture)
    return architecture.from_pretrained(
        None, config=model.config, state_dict=state, dtype=dtype, attn_implementation=attention
    )
