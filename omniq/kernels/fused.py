# SPDX-License-Identifier: Apache-2.0
"""Which tensors the fused kernels take, and how they lie in memory."""

import functools
import importlib.util
import warnings

import torch
from torch import Tensor

_TRITON = importlib.util.find_spec("triton") is not None  # asked once, here: torch.compile cannot look into it


def is_fused(tensor: Tensor) -> bool:
    """Whether a Triton kernel may take this tensor: on CUDA, not float64; says once if it could but for Triton."""
    fits = tensor.device.type == "cuda" and tensor.dtype != torch.float64
    if fits and not _TRITON:
        _say_slow()
    return fits and _TRITON


def packed(x: Tensor) -> Tensor:
    """``[..., c]`` whose rows of ``c`` follow one another in memory without gaps, in any order: ``x``, or a copy."""
    if x.is_contiguous():
        return x
    dense, expected = x.stride(-1) == 1, x.shape[-1]
    for stride, size in sorted(layout_of(x.select(-1, 0))):
        dense, expected = dense and stride == expected, expected * size
    return x if dense else x.contiguous()


def layout_of(x: Tensor) -> list[tuple[int, int]]:
    """Stride and size of every dimension that has more than one element: equal, the tensors lie alike."""
    return [(stride, size) for stride, size in zip(x.stride(), x.shape, strict=True) if size > 1]


@functools.cache
def _say_slow() -> None:
    warnings.warn("triton is not installed: fake quantization on CUDA runs unfused, several times slower", stacklevel=3)
