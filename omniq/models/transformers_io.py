# SPDX-License-Identifier: Apache-2.0
"""Open a checkpoint, its config or its tokenizer through plain transformers, but never from pickled weights."""

from pathlib import Path
from typing import Any

import torch
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from omniq.errors import NotByBlocks, UserError, one_line
from omniq.models.checkpoint import SafetensorsCheckpoint
from omniq.models.decoder_only import check_decoder_only, check_type
from omniq.models.gguf import reading_gguf
from omniq.models.no_progress_bars import without_bars
from omniq.models.weight_files import INDEX, SINGLE, configured_file, read_json, weight_file


def open_weights(folder: Path, file: str | None = None, **options: Any) -> PreTrainedModel:
    """``AutoModelForCausalLM.from_pretrained``, after a check that the weight files exist and that their headers parse.

    Args:
        folder: of the checkpoint.
        file: the weight file in it, if the user named one.
        **options: for ``from_pretrained``.

    Raises:
        UserError: there are only pickle files, a file is missing, truncated or corrupt, or has a name that
            transformers does not look for.
    """
    model: PreTrainedModel
    file = weight_file(folder, file)
    if file.endswith(".gguf"):
        with reading_gguf(folder / file):
            model = AutoModelForCausalLM.from_pretrained(folder, gguf_file=file, **options)
        return model
    if file not in (SINGLE, INDEX, configured_file(folder)):
        raise UserError(f"{folder / file}: transformers looks for {SINGLE} only: rename the file")
    SafetensorsCheckpoint(folder, file)
    model = AutoModelForCausalLM.from_pretrained(folder, use_safetensors=True, **options)
    return model


def open_checkpoint(path: str | Path, file: str | None = None, **options: Any) -> PreTrainedModel:
    """``open_weights`` without progress bars; one token runs through the model, because that shows the last bar."""
    with without_bars():
        model = open_weights(Path(path), file, **options)
        with torch.no_grad():
            model(torch.zeros(1, 1, dtype=torch.int64, device=model.device), use_cache=False)
    return model


def open_config(folder: Path, gguf_file: str | None = None, remote_code: bool = False) -> PretrainedConfig:
    """The config of a model that omniq can take apart into blocks, from a folder or a GGUF file in it.

    The name of the weight file (``transformers_weights``) is removed: it belongs to the folder and not to the model,
    so no export may inherit it.

    Args:
        folder: of the checkpoint.
        gguf_file: the file that holds the config.
        remote_code: run code that comes with it.

    Raises:
        NotByBlocks: the type is unknown, the model is not decoder-only, or it is quantized already.
        UserError: config.json or the GGUF file is missing or damaged.
    """
    if gguf_file is not None:
        with reading_gguf(folder / gguf_file):
            described: PretrainedConfig = AutoConfig.from_pretrained(folder, gguf_file=gguf_file)
        check_decoder_only(described)
        return described
    file = folder / "config.json"
    content = read_json(file)
    check_type(content.get("model_type"), remote_code)
    if quantized := content.get("quantization_config"):
        method = quantized.get("quant_method", "unknown") if isinstance(quantized, dict) else quantized
        raise NotByBlocks(f"{file}: the model is quantized already ({method}): give the model it was made from")
    try:
        # transformers' own models fail on return_dict=false: an inner model returns a tuple where they read a field
        config: PretrainedConfig = AutoConfig.from_pretrained(folder, trust_remote_code=remote_code, return_dict=True)
    except Exception as error:  # the validation of configs raises many kinds
        raise UserError(
            f"{file} cannot be read as a config of transformers ({one_line(error)}): get the file again"
        ) from error
    check_decoder_only(config)
    if hasattr(config, "transformers_weights"):
        del config.transformers_weights
    return config


def open_tokenizer(folder: Path, gguf_file: str | None = None, remote_code: bool = False) -> PreTrainedTokenizerBase:
    """The tokenizer of a folder, or of a GGUF file in it.

    Args:
        folder: of the checkpoint.
        gguf_file: the file that holds the tokenizer.
        remote_code: run code that comes with it.

    Raises:
        UserError: no tokenizer can be read.
    """
    extra: dict[str, Any] = {} if gguf_file is None else {"gguf_file": gguf_file}
    try:
        tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(
            folder, trust_remote_code=remote_code, **extra
        )
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"no tokenizer can be read from {folder} ({one_line(error)}): put its files there") from error
    return tokenizer
