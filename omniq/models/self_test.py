# SPDX-License-Identifier: Apache-2.0
"""Does a model compute the same block by block as in one piece?

omniq runs each block with arguments that it recorded from one sample, and assumes that no block reads anything else
from the model. The test runs the model's own forward on two samples, in which the first block of each kind computes
and all other blocks pass the hidden states on. It compares the logits with those of the same blocks, streamed:

    error = || streamed - own || / || own ||

Measured: 0.0 for all variants of ``tests/helpers/zoo.py`` in float32.
"""

import torch

from omniq.errors import NotByBlocks
from omniq.models.discover import random_tokens
from omniq.models.source import SourceModel

TOLERANCE = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 2e-2}
"""The largest error, by the dtype of the computation: about ten times its precision."""


@torch.no_grad()
def streaming_error(source: SourceModel, device: torch.device) -> float:
    """The relative difference between the logits of the streamed and of the whole model."""
    tokens = random_tokens(source, 2)
    hidden, arguments = source.embed(tokens, device)
    indices = sorted(set(source.kinds(arguments)))
    for index in indices:
        output = source.block(index, device)(hidden, **arguments[index])
        hidden = output[0] if isinstance(output, tuple) else output
    streamed = source.logits(hidden, device)
    own = source.own_logits(tokens, indices, device)
    source.release()
    return float((streamed.double() - own.double()).norm() / own.double().norm())


def check_streaming(source: SourceModel, device: torch.device) -> None:
    """Refuse a model that computes differently block by block. Logits that are not finite are reported later.

    Raises:
        NotByBlocks: names the model type and the measured error.
    """
    error, most = streaming_error(source, device), TOLERANCE.get(source.dtype, 1e-5)
    if error > most:
        raise NotByBlocks(
            f"model type {source.config.model_type!r} cannot be quantized block by block: its logits differ by "
            f"{error:.1e} from those of its own forward, and {most:.0e} is allowed; choose a model of another type"
        )
