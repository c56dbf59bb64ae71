# SPDX-License-Identifier: Apache-2.0
"""The two activation streams: what the full-precision model feeds a block, and what the quantized one really does."""

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

Precision = Callable[[], AbstractContextManager[Any]]


@dataclass
class Streams:
    """Activations of every sample at a block boundary.

    Args:
        index: the block they enter.
        full_precision, quantized: ``[n, t, h]`` each; the last samples may be held out from training.
    """

    index: int
    full_precision: Tensor
    quantized: Tensor

    @classmethod
    def start(cls, hidden: Tensor) -> "Streams":
        """At block 0 both are the embedding."""
        return cls(0, hidden, hidden.clone())


def call_block(block: nn.Module, hidden: Tensor, kwargs: Mapping[str, Any]) -> Tensor:
    """One forward of a block, ``[n, t, h]`` to ``[n, t, h]``."""
    output = block(hidden, **kwargs)
    return output[0] if isinstance(output, tuple) else output  # some families return (hidden states, …)


def propagate(block: nn.Module, stream: Tensor, kwargs: Mapping[str, Any], precision: Precision, batch: int = 4) -> None:
    """Replace a stream, ``[n, t, h]``, by what the block makes of it: in place, in batches, without gradients.

    Args:
        precision: enters the autocast context of the run, so that propagation and calibration compute alike.
        batch: samples at once.
    """
    device = next(block.parameters()).device
    with torch.no_grad(), precision():
        for start in range(0, len(stream), batch):
            chunk = stream[start : start + batch].to(device)
            stream[start : start + batch] = call_block(block, chunk, kwargs)
