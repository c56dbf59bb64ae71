# SPDX-License-Identifier: Apache-2.0
"""The one table of number formats: names of torch, codes of safetensors files, and what each dtype may be used for.

The names are those of ``torch`` without the prefix (``bfloat16``), as YAML files and ``config.json`` write them. The
codes are those in the header of a safetensors file (``BF16``).

The module does not import torch, so that a configuration can be checked without it.
"""

from typing import TYPE_CHECKING, Literal, get_args

if TYPE_CHECKING:
    import torch

ModelDtype = Literal["float16", "bfloat16", "float32"]
"""What transformers runs models in: the dtypes of parameters, of scales, and of exported models."""

MODEL_DTYPES: tuple[str, ...] = get_args(ModelDtype)
SCALE_DTYPES = MODEL_DTYPES  # an exported scale has the dtype of the exported model

CODES = {
    "float64": "F64",
    "float32": "F32",
    "float16": "F16",
    "bfloat16": "BF16",
    "int64": "I64",
    "int32": "I32",
    "int16": "I16",
    "int8": "I8",
    "uint8": "U8",
    "bool": "BOOL",
}
"""The dtypes that omniq writes to files, each with its code. Files of others may hold further codes (``F8_E4M3``)."""

WEIGHT_DTYPES = ("float64", "float32", "float16", "bfloat16")
"""In what the weights of a model that is not quantized may be stored."""


def dtype_name(dtype: "torch.dtype") -> str:
    """The name of a dtype, such as ``bfloat16``."""
    return str(dtype).removeprefix("torch.")


def torch_dtype(name: str) -> "torch.dtype":
    """The dtype of a name in the table."""
    import torch

    dtype: torch.dtype = getattr(torch, name)
    return dtype


def holds_weights(label: str) -> bool:
    """Whether a dtype, given as a name or as a code, may hold the weights of a model that is not quantized."""
    return label in WEIGHT_DTYPES or label in [CODES[name] for name in WEIGHT_DTYPES]
