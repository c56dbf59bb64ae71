# SPDX-License-Identifier: Apache-2.0
"""What happens beside the calibration: the next block is read while this one trains, and the last one is written.

One thread each, host memory only: neither calls CUDA, so that a CUDA graph can be captured at any time.
"""

import gc
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import torch
from torch import nn

from omniq.models.source import SourceModel


def blocks_ahead(source: SourceModel, start: int, device: torch.device) -> Iterator[tuple[int, nn.Module]]:
    """Blocks on the device, from ``start`` to the last; while the caller has one, the next one is read.

    Two blocks are alive at any time if the caller lets go of each before it asks for the next. What is left of a block
    is collected here: Lightning's objects refer to each other, and one of them to the block.
    """
    gc.freeze()  # what there is now is none of it: looking through would take a third of a second every time
    try:
        with ThreadPoolExecutor(1, thread_name_prefix="read") as reader:
            coming = [reader.submit(source.block, start)]  # emptied by taking: a finished future holds its result
            for index in range(start, source.num_blocks):
                block = coming.pop().result()
                if index + 1 < source.num_blocks:
                    coming.append(reader.submit(source.block, index + 1))
                yield index, block.to(device)
                del block
                gc.collect()
    finally:
        gc.unfreeze()
