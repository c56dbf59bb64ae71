# SPDX-License-Identifier: Apache-2.0
"""Run one block: a single forward, or an activation stream in batches without gradients."""

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor, nn

from omniq.blocks.placement import gather_samples

Precision = Callable[[], AbstractContextManager[Any]]


def call_block(block: nn.Module, hidden: Tensor, kwargs: Mapping[str, Any]) -> Tensor:
    """Run one forward of a block, ``[n, t, h]`` to ``[n, t, h]``."""
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
        block: the block.
        stream: the inputs of the block, ``[n, t, h]``.
        kwargs: the other arguments of the block's forward.
        precision: enters the autocast context of the run, so that propagation and calibration compute identically.
        batch: number of samples per forward.
        use: called for each batch with its slice of the stream and the output of the block, ``[batch, t, h]``.
    """
    device = next(block.parameters()).device
    with torch.no_grad(), precision():
        for start in range(0, len(stream), batch):
            samples = slice(start, start + batch)
            use(samples, call_block(block, gather_samples(stream, samples, device), kwargs))


def propagate(
    block: nn.Module, stream: Tensor, kwargs: Mapping[str, Any], precision: Precision, batch: int = 4
) -> bool:
    """Replace a stream, ``[n, t, h]``, by the outputs of the block, in place.

    Returns:
        Whether all outputs are finite. The check runs on the device of the block, which is faster than the host.
    """
    device = next(block.parameters()).device
    finite = torch.ones((), dtype=torch.bool, device=device)

    def store(samples: slice, output: Tensor) -> None:
        torch.logical_and(finite, output.isfinite().all(), out=finite)
        stream[samples].copy_(output, non_blocking=True)

    forward_stream(block, stream, kwargs, precision, batch, store)
    if stream.device != device and device.type == "cuda":
        torch.cuda.synchronize(device)  # copies of the last batches to the host may be pending
    return bool(finite)
