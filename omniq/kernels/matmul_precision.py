# SPDX-License-Identifier: Apache-2.0
"""How the hardware multiplies float32 matrices: a process-wide switch, set for the duration of a ``with`` block."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Literal

import torch

Precision = Literal["float32", "tf32", "float64"]


@contextmanager
def matmul_precision(precision: Precision | Literal["bf16"], device: torch.device) -> Iterator[None]:
    """Set how float32 is multiplied on a device, and restore the former setting afterwards.

    CUDA rounds factors to TF32 for ``tf32``, and for ``bf16`` as well (torch's ``medium``). On a CPU only ``bf16`` has
    an effect: oneDNN multiplies instead of MKL, in bfloat16 with float32 sums if the CPU has AMX, in float32 if it has
    only AVX-512.
    """
    ours, rounded = (0, "tf32") if device.type == "cuda" else (1, "bf16")
    asked = precision in (rounded, "bf16")
    both = (torch.backends.cuda.matmul, getattr(torch.backends.mkldnn, "matmul", None))
    newer: list[Any] = [each for each in both if hasattr(each, "fp32_precision")]  # since torch 2.9, both or none
    before = [each.fp32_precision for each in newer]
    now = before[ours] == rounded if newer else torch.get_float32_matmul_precision() in ("high", "medium")[ours:]
    if asked == now:
        yield
        return
    try:
        # NOTE: the older setting sets all newer ones, but not the reverse, and torch refuses to read a mixture.
        older = torch.get_float32_matmul_precision()
        torch.set_float32_matmul_precision({"tf32": "high", "bf16": "medium"}.get(precision, "highest"))
    except RuntimeError:  # the user has set the newer ones
        older = None
        newer[ours].fp32_precision = rounded if asked else "ieee"
    try:
        yield
    finally:
        if older is not None:
            torch.set_float32_matmul_precision(older)
        for backend, value in zip(newer, before, strict=True):
            backend.fp32_precision = value
