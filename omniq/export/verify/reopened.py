# SPDX-License-Identifier: Apache-2.0
"""An exported folder in plain transformers, where the machine has the memory for it.

What transformers needs, measured with a model of 257 MiB in float16: in the formats of compressed-tensors every weight
in the dtype of deployment and what is stored besides (4 bits, 68 MiB stored: 344; 8 bits, 129 stored: 393); in omniq's
format what is stored, and 20 bytes for each weight of the linear that runs.
"""

from copy import deepcopy
from functools import cached_property
from math import prod
from pathlib import Path

import torch
from transformers import AutoConfig, PretrainedConfig, PreTrainedModel

from omniq.distributed.memory import free_host_memory
from omniq.export.containers.target_model import TargetModel
from omniq.export.formats.format import Format
from omniq.models.transformers_io import open_checkpoint

_UNPACKING = 20  # bytes a weight
_SPARE = 1.1  # for activations, logits, and what other programs take meanwhile


class ReopenedCheckpoint:
    """A folder that is opened when its model is first asked for, once, and only where it fits into host memory.

    Args:
        path: the folder.
        layout: its format.
    """

    def __init__(self, path: Path, layout: Format) -> None:
        self.path, self._layout = path, layout

    @cached_property
    def model(self) -> PreTrainedModel | None:
        """As ``AutoModelForCausalLM.from_pretrained`` gives it; None where it does not fit."""
        return open_checkpoint(self.path) if self.lacking is None else None

    @cached_property
    def lacking(self) -> str | None:
        """What is lacking to open it, in words; None if nothing is."""
        needed, free = int(_SPARE * self.needed), free_host_memory()
        if needed <= free:
            return None
        return f"transformers needs {needed / 1e9:,.1f} GB of host memory to open it and {free / 1e9:,.1f} are free"

    @property
    def needed(self) -> int:
        """Bytes of host memory that the open model takes."""
        config = plain_config(self.path)
        model, dtype = TargetModel.of(config), config.dtype
        stored = sum(file.stat().st_size for file in self.path.glob("*.safetensors"))
        if self._layout.stays_packed:
            linears = model.parameters.keys() & {f"{name}.weight" for name in model.linears}  # without a tied head
            return stored + _UNPACKING * max(prod(model.parameters[name]) for name in linears)
        width = dtype.itemsize if isinstance(dtype, torch.dtype) else 4
        return stored + width * sum(map(prod, model.parameters.values()))


def plain_config(path: Path) -> PretrainedConfig:
    """The config of an exported folder without what it says of quantization: that of a stock model."""
    config = deepcopy(AutoConfig.from_pretrained(path))
    del config.quantization_config
    return config
