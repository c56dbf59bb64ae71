# SPDX-License-Identifier: Apache-2.0
"""``omniq evaluate``: omniq streams a model that it can split into blocks; transformers runs any other model.

The other models are quantized checkpoints and models of a family that omniq does not know.
"""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import gettempdir
from typing import Any

import torch
from torch import Tensor

from omniq.blocks.placement import ActivationPlacement
from omniq.config.run import EvaluatedModel
from omniq.data import Bos, Evaluation
from omniq.errors import NotByBlocks, UserError, one_line
from omniq.evaluate.perplexity import evaluate_model, evaluate_streamed
from omniq.evaluate.result import PerplexityResult
from omniq.models.locate import locate
from omniq.models.self_test import check_streaming
from omniq.models.source import SourceModel
from omniq.models.transformers_io import open_checkpoint, open_tokenizer
from omniq.models.weight_files import read_json, weight_file
from omniq.report.console import plain_console
from omniq.report.table import perplexity_table, write_results
from omniq.storage.atomic import check_possible, expand_home, temporary_of


def evaluate_checkpoint(
    model: EvaluatedModel, evaluation: Evaluation, device: str, batch: int, out: Path | None
) -> None:
    """Measure the perplexity, print it, and write it to ``out`` if a file is given.

    Raises:
        UserError: the model, the text or the device is not available, or the result cannot be written.
    """
    if batch < 1:
        raise UserError(f"batch {batch} is too small: give 1 or more")
    if out is not None:
        out = expand_home(out)
        check_result_file(out)
    result, bos = measure(model, evaluation, find_device(device), batch)
    text = evaluation.describe(bos)
    plain_console().print(perplexity_table({model.path: result}, title=text))
    if out is not None:
        write_results(out, {model.path: result}, text=text)


def check_result_file(out: Path) -> None:
    """Refuse a result file that cannot be written, before the measurement starts.

    Raises:
        UserError: the path is a folder, a device or too long, its parent folder is missing, or that folder is not
            writable.
    """
    folder = out.absolute().parent
    check_possible(temporary_of(out))
    if out.is_dir():
        raise UserError(f"out {out} cannot be written: it is a folder; give the name of a file in it")
    if out.exists() and not out.is_file():  # a rename would replace the device by a file
        raise UserError(f"out {out} cannot be written: it is not a regular file; give the name of a JSON file")
    if not folder.is_dir():
        raise UserError(f"out {out} cannot be written: {folder} is not a folder; create it or choose another")
    if not os.access(folder, os.W_OK | os.X_OK):
        raise UserError(f"out {out} cannot be written: no permission in {folder}; choose another folder")


def find_device(name: str) -> torch.device:
    """Return the device of this name; ``auto`` selects a GPU if one is present.

    Raises:
        UserError: the device is unknown, absent, or cannot compute.
    """
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if name.startswith("cuda") and not torch.cuda.is_available():
        raise UserError(f"device {name!r}: no GPU is present; use cpu or auto")
    try:
        device = torch.device(name)
        torch.zeros(1, device=device).item()  # fails on the meta device, which holds no values
    except Exception as error:  # every backend refuses in its own way
        raise UserError(f"device {name!r} cannot be used ({one_line(error)}): use cpu, cuda or auto") from error
    return device


def measure(
    model: EvaluatedModel, evaluation: Evaluation, device: torch.device, batch: int
) -> tuple[PerplexityResult, Bos]:
    """Measure the perplexity of a model that omniq or transformers can open.

    Returns:
        the result, and where the windows begin with BOS.

    Raises:
        UserError: the model is not found, neither omniq nor transformers can open it, or the text does not fit it.
    """
    folder, file = locate(model.path, model.gguf_file, model.trust_remote_code)
    place = folder if file is None else folder / file
    try:
        source = SourceModel.open(place, None, _dtype(model, device), model.attention, model.trust_remote_code)
        check_streaming(source, device)
    except NotByBlocks:
        return _measure_with_transformers(folder, weight_file(folder, file), model, evaluation, device, batch)
    windows, bos = _windows(evaluation, source.tokenizer(), source.config.model_type)

    def placement(size: int) -> ActivationPlacement:
        return ActivationPlacement.choose("auto", device, Path(gettempdir()), size, count=1)

    variants = {"model": lambda index, block: block}
    return evaluate_streamed(source, windows, variants, device, batch, placement=placement)["model"], bos


def _windows(evaluation: Evaluation, tokenizer: Any, model_type: str | None) -> tuple[Tensor, Bos]:
    return evaluation.sequences(tokenizer, model_type), evaluation.place_of_bos(tokenizer, model_type)


def _measure_with_transformers(
    folder: Path, file: str, model: EvaluatedModel, evaluation: Evaluation, device: torch.device, batch: int
) -> tuple[PerplexityResult, Bos]:
    """Measure with transformers. A quantized checkpoint keeps its own dtype, also on a CPU."""
    gguf = file if file.endswith(".gguf") else None
    config = {} if gguf is not None else read_json(folder / "config.json")
    tokenizer = open_tokenizer(folder, gguf, model.trust_remote_code)
    windows, bos = _windows(evaluation, tokenizer, config.get("model_type"))
    quantized = bool(config.get("quantization_config"))
    with _open_errors_in_one_line(folder, model):
        loaded = open_checkpoint(
            folder,
            file,
            dtype=model.dtype if quantized else _dtype(model, device),
            attn_implementation=model.attention,
            trust_remote_code=model.trust_remote_code,
        )
    return evaluate_model(loaded, windows, batch, device), bos


def _dtype(model: EvaluatedModel, device: torch.device) -> str:
    """Return the dtype of the computations: on a CPU, ``auto`` means float32, because half precision is slow there."""
    return "float32" if model.dtype == "auto" and device.type == "cpu" else model.dtype


@contextmanager
def _open_errors_in_one_line(folder: Path, model: EvaluatedModel) -> Iterator[None]:
    """Convert any error of transformers, or of a package that it needs, to a ``UserError`` that names the folder."""
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        raise UserError(
            f"transformers cannot open {folder} ({one_line(error)}): correct the named setting, such as "
            f"model.attention {model.attention!r} or model.trust_remote_code {model.trust_remote_code}, "
            "or give another model"
        ) from error
