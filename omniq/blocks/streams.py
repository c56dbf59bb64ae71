# SPDX-License-Identifier: Apache-2.0
"""The two activation streams: the inputs of a block in the full-precision model and in the quantized model.

The user chooses the memory of the streams: device memory; host memory, pinned if a GPU is present, so that the host
does not wait for batches; or memory-mapped files in the run directory, for more samples than memory holds. Such a file
has no name, and the kernel frees it when the process ends. The copy that is written to the run directory in the
background is in host memory, or in such files if host memory has no room for it.

Shapes: ``n`` samples of this process, ``t`` tokens per sample, ``h`` hidden size.
"""

from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from omniq.blocks.placement import empty_like_stream, mapped_tensor
from omniq.distributed import collectives


@dataclass
class Streams:
    """The activations of all samples at a block boundary.

    Args:
        index: index of the block that the streams enter.
        full_precision, quantized: the streams, ``[n, t, h]`` each. The last samples may be held out.
    """

    index: int
    full_precision: Tensor
    quantized: Tensor

    @classmethod
    def start(cls, hidden: Tensor) -> "Streams":
        """Make the streams at block 0, where both are the embeddings ``hidden``, ``[n, t, h]``."""
        return cls(0, hidden, empty_like_stream(hidden).copy_(hidden))

    def snapshot(self, folder: Path | None = None) -> "Streams | None":
        """Copy both streams, with the samples of all processes in order, so that rank 0 can write them.

        Args:
            folder: the folder for files that hold the copy. By default the copy is in host memory.

        Returns:
            The copy on rank 0, None on the other ranks.
        """
        parts = [_gather_on_rank0(stream, folder) for stream in (self.full_precision, self.quantized)]
        return Streams(self.index, *parts) if collectives.rank() == 0 else None


def _gather_on_rank0(stream: Tensor, folder: Path | None, batch: int = 4) -> Tensor:
    number = collectives.world_size()
    shape = (number * len(stream), *stream.shape[1:])
    if collectives.rank() != 0:
        whole = stream.new_empty(0)
    elif folder is not None:
        whole = mapped_tensor(folder, shape, stream.dtype)
    else:
        whole = torch.empty(shape, dtype=stream.dtype)
    for start in range(0, len(stream), batch):
        part = collectives.all_gather_samples(stream[start : start + batch])
        if len(whole):
            whole[number * start : number * start + len(part)].copy_(part)
    return whole
