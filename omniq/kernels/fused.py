# SPDX-License-Identifier: Apache-2.0
"""The one place that chooses between the torch and the Triton implementation of a kernel.

A kernel ``NAME`` has up to two modules with the same functions: ``omniq.kernels.NAME_torch``, the reference, which runs
everywhere, and ``omniq.kernels.NAME_triton``, which runs on CUDA where Triton is installed. A caller asks ``is_fused``
or ``is_descent_fused`` and passes the answer to ``implementation``. Only ``implementation`` imports a Triton module.
"""

import functools
import warnings
from contextlib import AbstractContextManager, nullcontext
from importlib import import_module
from importlib.util import find_spec
from types import ModuleType
from typing import Literal

import torch
from torch import Tensor

Backend = Literal["auto", "torch", "triton"]

_TRITON = find_spec("triton") is not None  # at import, because torch.compile cannot trace the search


def implementation(name: str, fused: bool) -> ModuleType:
    """The module that implements a kernel: ``omniq.kernels.NAME_triton`` if ``fused``, else the torch reference."""
    return import_module(f"omniq.kernels.{name}_{'triton' if fused else 'torch'}")


def is_fused(tensor: Tensor) -> bool:
    """True if elementwise kernels run this tensor in Triton: on CUDA and not float64.

    Warns once if only the missing Triton prevents it.
    """
    supported = tensor.device.type == "cuda" and tensor.dtype != torch.float64
    if supported and not _TRITON:
        _warn_unfused()
    return supported and _TRITON


def is_descent_fused(tensor: Tensor, backend: Backend) -> bool:
    """True if coordinate descent runs this tensor in Triton: by request, or on CUDA with Triton 3.3 or newer."""
    return backend == "triton" or (backend == "auto" and tensor.is_cuda and _triton_holds_tuples())


def on_device(tensor: Tensor) -> AbstractContextManager[object]:
    """Make the tensor's GPU current, because Triton launches on the current one. No-op for Triton's CPU interpreter."""
    return torch.cuda.device(tensor.device) if tensor.is_cuda else nullcontext()


def packed(x: Tensor) -> Tensor:
    """``x`` itself if its rows ``[..., c]`` fill a block of memory without gaps, in any order; else a copy."""
    if x.is_contiguous():
        return x
    dense, expected = x.stride(-1) == 1, x.shape[-1]
    for stride, size in sorted(layout_of(x.select(-1, 0))):
        dense, expected = dense and stride == expected, expected * size
    return x if dense else x.contiguous()


def layout_of(x: Tensor) -> list[tuple[int, int]]:
    """Stride and size of each dimension longer than 1. Two tensors with equal lists have the same memory layout."""
    return [(stride, size) for stride, size in zip(x.stride(), x.shape, strict=True) if size > 1]


@functools.cache
def _warn_unfused() -> None:
    warnings.warn("triton is not installed: fake quantization on CUDA runs unfused, several times slower", stacklevel=3)


@functools.cache
def _triton_holds_tuples() -> bool:
    """True for Triton 3.3 or newer: the descent kernel holds columns in tuples, which older releases lack."""
    if not _TRITON:
        return False
    from triton import __version__

    return tuple(int(number) for number in __version__.split(".")[:2]) >= (3, 3)
