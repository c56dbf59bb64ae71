# SPDX-License-Identifier: Apache-2.0
"""Run one block: a single forward, or a whole activation stream in batches, without gradients."""

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor, nn

from omniq.blocks.placement import gather_samples

Precision = Callable[[], AbstractContextManager[Any]]


def call_block(block: nn.Module, hidden: Tensor, kwargs: Mapping[str, Any]) -> Tensor:
    """One forward of a block, ``[n, t, h]`` to ``[n, t, h]``."""
    output = block(hidden, **kwargs)
    return output[0] if isinstance(output, tuple) else output  # some families return (hidden states, …)


def forward_stream(
    block: nn.Module,
    stream: Tensor,
    kwargs: Mapping[str, Any],
    precision: Precision,
    batch: int = 4,
    use: Callable[[slice, Tensor], Any] = lambda samples, output: None,
) -> None:
    """Send a stream through a block, in batches, without gradients.

    Args:
        precision: enters the autocast context of the run, so that propagation and calibration compute alike.
        batch: samples at once.
        use: called with each batch's place in the stream and the block's output, ``[batch, t, h]``.
    """
    device = next(block.parameters()).device
    with torch.no_grad(), precision():
        for start in range(0, len(stream), batch):
            samples = slice(start, start + batch)
            use(samples, call_block(block, gather_samples(stream, samples, device), kwargs))


def propagate(
    block: nn.Module, stream: Tensor, kwargs: Mapping[str, Any], precision: Precision, batch: int = 4
) -> bool:
    """Replace a stream, ``[n, t, h]``, by what the block makes of it: in place, as ``forward_stream`` goes along.

    Returns:
        whether all of it is finite, which the block's device tells faster than the host would.
    """
    device = next(block.parameters()).device
    finite = torch.ones((), dtype=torch.bool, device=device)

    def store(samples: slice, output: Tensor) -> None:
        torch.logical_and(finite, output.isfinite().all(), out=finite)
        stream[samples].copy_(output, non_blocking=True)

    forward_stream(block, stream, kwargs, precision, batch, store)
    if stream.device != device and device.type == "cuda":
        torch.cuda.synchronize(device)  # the last batches may still be on their way to the host
    return bool(finite)
