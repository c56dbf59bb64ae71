# SPDX-License-Identifier: Apache-2.0
"""Read the next block in a background thread while the current block is calibrated.

The thread uses host memory only and never calls CUDA, so that a CUDA graph can be captured at any time.
"""

import gc
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import torch
from torch import nn

from omniq.models.source import SourceModel


def blocks_ahead(source: SourceModel, start: int, device: torch.device) -> Iterator[tuple[int, nn.Module]]:
    """Yield blocks on the device, from ``start`` to the last, and read the next block in the meantime.

    At most two blocks are in memory if the caller releases each block before it asks for the next. This function
    collects garbage after each block, because Lightning's objects form reference cycles that include the block.
    """
    gc.freeze()  # older objects are not garbage, and scanning them takes a third of a second per block
    try:
        with ThreadPoolExecutor(1, thread_name_prefix="read") as reader:
            pending = [reader.submit(source.block, start)]  # popped, because a finished future keeps its result alive
            for index in range(start, source.num_blocks):
                block = pending.pop().result()
                if index + 1 < source.num_blocks:
                    pending.append(reader.submit(source.block, index + 1))
                yield index, block.to(device)
                del block
                gc.collect()
    finally:
        gc.unfreeze()
