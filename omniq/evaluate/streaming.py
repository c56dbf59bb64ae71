# SPDX-License-Identifier: Apache-2.0
"""Stream a checkpoint block by block, once, and compute the logits of several variants of it side by side.

    tokens ─► embedding ─► for each block: every variant of it on its own activations ─► final norm and head ─► logits

Memory: one activation tensor ``[m, t, h]`` per variant, on the device that the caller chooses
(``omniq.blocks.placement.ActivationPlacement``), the embedding, the head, and one block (two for several variants).

Shapes: ``m`` windows, ``b`` windows in a batch, ``t`` tokens per window, ``h`` hidden size, ``v`` vocabulary.
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import nullcontext
from copy import deepcopy
from pathlib import Path
from typing import Any

import torch
from lightning_utilities.core.apply_func import apply_to_collection
from torch import Tensor, nn

from omniq.blocks.forward import propagate
from omniq.blocks.placement import ActivationPlacement, gather_samples
from omniq.models.source import SourceModel

Variant = Callable[[int, nn.Module], nn.Module]
"""Maps the index of a block and a fresh full-precision copy of it to the block to run; may modify the copy."""


@torch.no_grad()
def stream_logits(
    source: SourceModel,
    windows: Tensor,
    variants: Mapping[str, Variant],
    device: torch.device | str = "cpu",
    batch_size: int = 1,
    progress: Callable[[int], None] = lambda block: None,
    dtype: torch.dtype | None = None,
    placement: Callable[[int], ActivationPlacement] | None = None,
) -> Iterator[tuple[str, Tensor, Tensor]]:
    """Compute logits of several variants of a checkpoint, in one pass over its blocks.

    Args:
        windows: int64 ``[m, t]``.
        variants: ``lambda index, block: block`` is the unmodified model.
        progress: called with the number of finished blocks.
        dtype: dtype of blocks and activations; by default that of the checkpoint. Embedding and head keep their dtype.
        placement: chooses where activations live, given the bytes of one variant's; by default on ``device``.

    Yields:
        for each variant and batch: the name, logits ``[b, t, v]`` and tokens ``[b, t]``, both on ``device``.

    Raises:
        UserError: the windows are longer than the model's context, or contain tokens outside its vocabulary.
    """
    device = torch.device(device)
    first, kwargs = source.embed(windows[:1], device)
    dtype = dtype or first.dtype
    size = windows.numel() * first.shape[-1] * dtype.itemsize
    place = ActivationPlacement("device", device, Path()) if placement is None else placement(size)
    streams = {name: place.empty((*windows.shape, first.shape[-1]), dtype) for name in variants}
    batches = [slice(start, start + batch_size) for start in range(0, len(windows), batch_size)]
    for batch in batches:
        hidden = source.embed(windows[batch], device)[0]
        for stream in streams.values():
            stream[batch].copy_(hidden)
    for index in range(source.num_blocks):
        arguments = kwargs[index] if dtype == source.dtype else _cast(kwargs[index], dtype)  # some tables are float32
        _advance(streams, variants, index, source.block(index, device, dtype), arguments, batch_size)
        progress(index + 1)
    for name, stream in streams.items():
        for batch in batches:
            yield name, source.logits(gather_samples(stream, batch, device), device), windows[batch].to(device)


def _advance(
    streams: Mapping[str, Tensor],
    variants: Mapping[str, Variant],
    index: int,
    fresh: nn.Module,
    kwargs: Mapping[str, Any],
    batch_size: int,
) -> None:
    """Run every stream through its variant of a block."""
    last = list(variants)[-1:]  # may use the block itself instead of a copy
    for name, variant in variants.items():
        block = variant(index, fresh if name in last else deepcopy(fresh))
        propagate(block, streams[name], kwargs, nullcontext, batch_size)


def _cast(kwargs: Mapping[str, Any], dtype: torch.dtype) -> Mapping[str, Any]:
    """Cast rotary tables and masks to the dtype of the activations."""
    cast: Mapping[str, Any] = apply_to_collection(
        dict(kwargs), Tensor, lambda tensor: tensor.to(dtype) if tensor.is_floating_point() else tensor
    )
    return cast
