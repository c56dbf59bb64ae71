# SPDX-License-Identifier: Apache-2.0
"""``omniq evaluate``: a model that omniq can take apart is streamed block by block, any other run by transformers.

The others are those that are quantized already and those of a family that omniq does not know.
"""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import gettempdir

import torch

from omniq.blocks.placement import ActivationPlacement
from omniq.config.run import EvaluatedModel
from omniq.data import Evaluation
from omniq.errors import NotByBlocks, UserError, one_line
from omniq.evaluate.perplexity import evaluate_model, evaluate_streamed
from omniq.evaluate.result import PerplexityResult
from omniq.models.locate import locate
from omniq.models.source import SourceModel
from omniq.models.transformers_io import open_checkpoint, open_tokenizer
from omniq.models.weight_files import read_json, weight_file
from omniq.report.console import plain_console
from omniq.report.table import perplexity_table, write_results
from omniq.storage.atomic import check_possible, expanded, temporary_of


def evaluate_checkpoint(
    model: EvaluatedModel, evaluation: Evaluation, device: str, batch: int, out: Path | None
) -> None:
    """Measure, print, and write the result if asked to.

    Raises:
        UserError: model, text or device cannot be had, or the result could not be written.
    """
    if batch < 1:
        raise UserError(f"batch {batch} is too small: give 1 or more")
    if out is not None:
        out = expanded(out)
        check_file(out)
    result = measure(model, evaluation, find_device(device), batch)
    plain_console().print(perplexity_table({model.path: result}, title=evaluation.describe()))
    if out is not None:
        write_results(out, {model.path: result}, text=evaluation.describe())


def check_file(out: Path) -> None:
    """Refuse a file that could not be written, before anything is measured.

    Raises:
        UserError: a folder or a device is in its place, its own folder is missing, its path is too long, or there is no
            permission.
    """
    folder = out.absolute().parent
    check_possible(temporary_of(out))
    if out.is_dir():
        raise UserError(f"out {out} cannot be written: it is a folder; give the name of a file in it")
    if out.exists() and not out.is_file():  # a rename would put a file in the place of the device
        raise UserError(f"out {out} cannot be written: it is no regular file; give the name of a JSON file")
    if not folder.is_dir():
        raise UserError(f"out {out} cannot be written: {folder} is no folder; make it, or choose another")
    if not os.access(folder, os.W_OK | os.X_OK):
        raise UserError(f"out {out} cannot be written: no permission in {folder}; choose another folder")


def find_device(name: str) -> torch.device:
    """The device of that name; ``auto`` is a GPU where there is one.

    Raises:
        UserError: it is unknown, or absent, or computes nothing.
    """
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if name.startswith("cuda") and not torch.cuda.is_available():
        raise UserError(f"device {name!r}: no GPU is present; use cpu or auto")
    try:
        device = torch.device(name)
        torch.zeros(1, device=device).item()  # only the meta device has none to give
    except Exception as error:  # every backend refuses in its own way
        raise UserError(f"device {name!r} cannot be used ({one_line(error)}): use cpu, cuda or auto") from error
    return device


def measure(model: EvaluatedModel, evaluation: Evaluation, device: torch.device, batch: int) -> PerplexityResult:
    """The perplexity of a model that omniq or transformers can open.

    Raises:
        UserError: the model is not found, neither can open it, or the text does not go with it.
    """
    folder, file = locate(model.path, model.gguf_file, model.trust_remote_code)
    place = folder if file is None else folder / file
    try:
        source = SourceModel.open(place, None, _dtype(model, device), model.attention, model.trust_remote_code)
    except NotByBlocks:
        return _whole(folder, weight_file(folder, file), model, evaluation, device, batch)
    windows = evaluation.sequences(source.tokenizer())

    def home(size: int) -> ActivationPlacement:
        return ActivationPlacement.choose("auto", device, Path(gettempdir()), size, count=1)

    variants = {"model": lambda index, block: block}
    return evaluate_streamed(source, windows, variants, device, batch, home=home)["model"]


def _whole(
    folder: Path, file: str, model: EvaluatedModel, evaluation: Evaluation, device: torch.device, batch: int
) -> PerplexityResult:
    """By transformers; what is quantized keeps the dtype of its checkpoint on a CPU too."""
    gguf = file if file.endswith(".gguf") else None
    windows = evaluation.sequences(open_tokenizer(folder, gguf, model.trust_remote_code))
    quantized = gguf is None and bool(read_json(folder / "config.json").get("quantization_config"))
    with _opening(folder, model):
        loaded = open_checkpoint(
            folder,
            file,
            dtype=model.dtype if quantized else _dtype(model, device),
            attn_implementation=model.attention,
            trust_remote_code=model.trust_remote_code,
        )
    return evaluate_model(loaded, windows, batch, device)


def _dtype(model: EvaluatedModel, device: torch.device) -> str:
    """A CPU is slow in half precision."""
    return "float32" if model.dtype == "auto" and device.type == "cpu" else model.dtype


@contextmanager
def _opening(folder: Path, model: EvaluatedModel) -> Iterator[None]:
    """Turn the many errors of transformers and of the packages it asks for into one line that names the folder."""
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        raise UserError(
            f"transformers cannot open {folder} ({one_line(error)}): mend what it names, such as model.attention "
            f"{model.attention!r} or model.trust_remote_code {model.trust_remote_code}, or give another model"
        ) from error
