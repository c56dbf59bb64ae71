# SPDX-License-Identifier: Apache-2.0
"""The two activation streams: what the full-precision model feeds a block, and what the quantized one really does.

Where they live is the user's choice: in device memory; in host memory, pinned where there is a GPU, so that batches
come without the host waiting; or in memory-mapped files of the run directory, for more samples than memory holds. Such
a file has no name: it takes disk space while the run works and is gone with it. The copy that is written to the run
directory beside the calibration lies in host memory too, or in such files where that has no room for it.

Shapes: ``n`` samples (of this process, if there are several), ``t`` tokens of a sample, ``h`` hidden size.
"""

from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from omniq.blocks.placement import _mapped, empty_like_stream
from omniq.distributed import collectives


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
        return cls(0, hidden, empty_like_stream(hidden).copy_(hidden))

    def snapshot(self, folder: Path | None = None) -> "Streams | None":
        """Both streams as they are now, with the samples of all processes in order, for the first of them to write.

        None for the other processes.

        Args:
            folder: for files that the copy is made in; it is made in host memory if not given.
        """
        parts = [_gathered(stream, folder) for stream in (self.full_precision, self.quantized)]
        return Streams(self.index, *parts) if collectives.rank() == 0 else None


def _gathered(stream: Tensor, folder: Path | None, batch: int = 4) -> Tensor:
    number = collectives.world_size()
    shape = (number * len(stream), *stream.shape[1:])
    if collectives.rank() != 0:
        whole = stream.new_empty(0)
    elif folder is not None:
        whole = _mapped(folder, shape, stream.dtype)
    else:
        whole = torch.empty(shape, dtype=stream.dtype)
    for start in range(0, len(stream), batch):
        part = collectives.all_gather_samples(stream[start : start + batch])
        if len(whole):
            whole[number * start : number * start + len(part)].copy_(part)
    return whole
