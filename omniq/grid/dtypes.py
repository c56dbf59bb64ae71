# SPDX-License-Identifier: Apache-2.0
"""The only table of number formats: names of dtypes, their codes in safetensors files, and their permitted uses.

Names are those of ``torch`` without the prefix (``bfloat16``), as in YAML files and ``config.json``. Codes are those in
the header of a safetensors file (``BF16``).

This module does not import torch, so that a configuration can be checked without it.
"""

from typing import TYPE_CHECKING, Literal, get_args

if TYPE_CHECKING:
    import torch

ModelDtype = Literal["float16", "bfloat16", "float32"]
"""The dtypes in which transformers runs models; also those of parameters, of scales, and of exported models."""

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
"""The dtypes that omniq writes to files, with their codes. Files from other sources may hold others (``F8_E4M3``)."""

WEIGHT_DTYPES = ("float64", "float32", "float16", "bfloat16")
"""The dtypes in which the weights of an unquantized model may be stored."""


def dtype_name(dtype: "torch.dtype") -> str:
    """The name of a dtype, such as ``bfloat16``."""
    return str(dtype).removeprefix("torch.")


def torch_dtype(name: str) -> "torch.dtype":
    """The dtype for a name in the table."""
    import torch

    dtype: torch.dtype = getattr(torch, name)
    return dtype


def holds_weights(label: str) -> bool:
    """True if a dtype, given as a name or as a code, may hold the weights of an unquantized model."""
    return label in WEIGHT_DTYPES or label in [CODES[name] for name in WEIGHT_DTYPES]
