# SPDX-License-Identifier: Apache-2.0
"""``omniq evaluate``: a full-precision model is streamed block by block, a quantized one run by transformers."""

import json
from pathlib import Path

import torch
from rich.console import Console
from transformers import AutoTokenizer

from omniq.config import Model
from omniq.data import Evaluation
from omniq.errors import UserError
from omniq.evaluate.perplexity import PerplexityResult, evaluate_model, evaluate_streamed
from omniq.evaluate.table import perplexity_table, write_results
from omniq.models.reload import open_checkpoint
from omniq.models.source import SourceModel


def evaluate_checkpoint(model: Model, evaluation: Evaluation, device: str, batch: int, out: Path | None) -> None:
    """Measure, print, and write the result if asked to.

    Raises:
        UserError: model, text or device cannot be had.
    """
    where = find_device(device)
    measure = _quantized if is_quantized(model.path) else _streamed
    result = measure(model, evaluation, where, batch)
    Console().print(perplexity_table({model.path: result}, title=evaluation.describe()))
    if out is not None:
        write_results(out, {model.path: result}, text=evaluation.describe())


def find_device(name: str) -> torch.device:
    """The device of that name; ``auto`` is a GPU where there is one.

    Raises:
        UserError: a GPU was asked for and there is none.
    """
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if name.startswith("cuda") and not torch.cuda.is_available():
        raise UserError(f"device {name!r}: no GPU is present; use cpu or auto")
    try:
        return torch.device(name)
    except RuntimeError as error:
        raise UserError(f"device {name!r} is unknown: use cpu, cuda or auto") from error


def is_quantized(path: str) -> bool:
    """Whether a folder holds a checkpoint that says how it is quantized."""
    config = Path(path) / "config.json"
    return config.is_file() and "quantization_config" in json.loads(config.read_text())


def _quantized(model: Model, evaluation: Evaluation, device: torch.device, batch: int) -> PerplexityResult:
    windows = evaluation.windows(AutoTokenizer.from_pretrained(model.path))
    loaded = open_checkpoint(model.path, dtype=model.dtype, attn_implementation=model.attention)
    return evaluate_model(loaded, windows, batch, device)


def _streamed(model: Model, evaluation: Evaluation, device: torch.device, batch: int) -> PerplexityResult:
    dtype = "float32" if model.dtype == "auto" and device.type == "cpu" else model.dtype
    source = SourceModel.open(model.path, model.gguf_file, dtype, model.attention, model.trust_remote_code)
    windows = evaluation.windows(source.tokenizer())
    results = evaluate_streamed(source, windows, {"model": lambda index, block: block}, device, batch)
    return results["model"]
