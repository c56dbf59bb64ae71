# SPDX-License-Identifier: Apache-2.0
"""Does a checkpoint hold the parameters that its config asks for? Names, shapes and dtypes are known without reading.

Quantized weights without ``quantization_config`` would be read as if their codes were weights. Two signs give them
away: a parameter stored in a dtype that holds no weights (integers, bool, 8-bit floats), and a tensor stored inside a
linear that stock linears lack (``q_proj.qweight``, ``q_proj.SCB``, ``q_proj.weight_scale``). Unmerged adapters
(``q_proj.lora_A.weight``) have the second sign too, and are refused with the same message.
"""

import json
import logging
import os
from collections.abc import Collection, Mapping
from pathlib import Path

import torch
from torch import Tensor, nn
from transformers import PretrainedConfig, PreTrainedModel

from omniq.errors import UserError
from omniq.grid.dtypes import CODES, MODEL_DTYPES, dtype_name, holds_weights, torch_dtype
from omniq.models.checkpoint import Checkpoint

log = logging.getLogger(__name__)

_REMEDY = "and config.json has no quantization_config that says so: give the model that it was made from"


def check_checkpoint(
    folder: Path, model: PreTrainedModel, checkpoint: Checkpoint, alias: Mapping[str, str], tied: Collection[str]
) -> None:
    """Refuse a checkpoint that does not fit the model; warn of what it stores beyond it.

    Args:
        folder: to name in messages.
        model: on the meta device.
        checkpoint: under the names of the model.
        alias: parameters whose value is stored as that of another one.
        tied: parameters that need not be stored.

    Raises:
        UserError: a parameter is missing, has another shape, or is stored quantized.
    """
    stored = checkpoint.tensors
    wanted = {alias.get(name, name): value for name, value in model.state_dict().items()}
    _check_linears(model, checkpoint)
    missing = [name for name in wanted if name not in stored]
    if missing:
        raise UserError(
            f"{folder} lacks {len(missing)} parameters that its config asks for, such as {missing[0]}: "
            "get config.json and weights from the same place"
        )
    for name, value in wanted.items():
        _check_parameter(name, value, checkpoint)
    known = {*wanted, *tied}
    unused = [name for name in stored if name not in known and not name.endswith("rotary_emb.inv_freq")]
    if unused:
        log.warning("%s stores %d tensors the model does not use, such as %s", folder, len(unused), unused[0])


def stored_dtype(config: PretrainedConfig, checkpoint: Checkpoint) -> torch.dtype:
    """The dtype that the config names, or else the one in which most tensors are stored.

    Raises:
        UserError: the config names a dtype that holds no weights.
    """
    if isinstance(config.dtype, torch.dtype):
        if not holds_weights(dtype_name(config.dtype)):
            raise UserError(
                f"config.json: dtype {dtype_name(config.dtype)!r} cannot be the dtype of a model: set it, or "
                f"model.dtype, to one of {', '.join(MODEL_DTYPES)}"
            )
        return config.dtype
    codes = [stored.dtype for stored in checkpoint.tensors.values()]
    most = max(codes, key=codes.count, default="F32")
    return torch_dtype(next((name for name in MODEL_DTYPES if CODES[name] == most), "float32"))


def _check_linears(model: PreTrainedModel, checkpoint: Checkpoint) -> None:
    """Refuse tensors inside a linear that are neither its weight nor its bias."""
    linears = {name for name, module in model.named_modules() if isinstance(module, nn.Linear)}
    linears |= {name.removeprefix(f"{model.base_model_prefix}.") for name in linears}
    for name, stored in checkpoint.tensors.items():
        outer, _, inner = name.replace(":", ".").rpartition(".")  # torchao: weight:qdata
        while outer and outer not in linears:
            outer, _, more = outer.rpartition(".")
            inner = f"{more}.{inner}"
        if outer and inner not in ("weight", "bias"):
            raise UserError(
                f"{stored.file}: the tensor {name} shows that the linear {outer} is quantized or has an adapter, "
                + _REMEDY
            )


def _check_parameter(name: str, value: Tensor, checkpoint: Checkpoint) -> None:
    stored = checkpoint.tensors[name]
    if value.is_floating_point() and not holds_weights(stored.dtype):
        raise UserError(f"{stored.file}: {name} is quantized, as its dtype {stored.dtype} shows, {_REMEDY}")
    if stored.shape != tuple(value.shape):
        raise UserError(
            f"{stored.file}: {name} has shape {list(stored.shape)}, but the config asks for {list(value.shape)}: "
            "get config.json and weights from the same place"
        )


def check_generation_config(folder: Path) -> None:
    """Refuse a damaged ``generation_config.json``, which the export copies and which transformers would ignore.

    Raises:
        UserError: the file is no JSON object.
    """
    path = folder / "generation_config.json"
    if not os.path.lexists(path):
        return
    try:
        sound = isinstance(json.loads(path.read_bytes()), dict)
    except (OSError, ValueError, RecursionError):
        sound = False
    if not sound:
        raise UserError(f"{path} is not a JSON object: correct the file, or remove it to use transformers' defaults")
