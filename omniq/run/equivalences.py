# SPDX-License-Identifier: Apache-2.0
"""Verify, before the first block, every equivalence that the stages of a run use."""

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

from omniq.blocks.grids import scheme_layout
from omniq.calibration.fuse import affects_quantization
from omniq.config.run import Run
from omniq.errors import UserError
from omniq.models.source import SourceModel
from omniq.models.verify_equivalences import TOLERANCE, VerifiedBlock
from omniq.transforms.equivalence import Equivalence

_VERIFIED_TOKENS = 32  # number of tokens for the verification


def verify_equivalences(run: Run, source: SourceModel, tokens: Tensor, device: torch.device) -> None:
    """Apply every equivalence that the stages use to the real first block of each kind.

    Args:
        run: the configuration.
        source: the opened model.
        tokens: calibration samples, int64 ``[n, t]``. The first tokens of the first sample are embedded.
        device: device of the computations.

    Raises:
        UserError: an equivalence changes the output of a block.
    """
    if not source.family.groups:
        return  # an undeclared family: discovery has verified its equivalences
    embedded, verified = None, set()
    for index in range(source.num_blocks if run.blocks is None else min(run.blocks, source.num_blocks)):
        layout = scheme_layout(source, run.scheme, index)
        kinds = {kind for stage in run.stages for kind in stage.equivalence_kinds(layout, run.scheme.activations)}
        used = tuple(each for each in layout.equivalences if each.kind in kinds and affects_quantization(layout, each))
        key = (used, layout.heads, layout.can_bias, source.structure(index))
        if not used or key in verified:
            continue
        verified.add(key)
        embedded = embedded or source.embed(tokens[:1, :_VERIFIED_TOKENS], device)
        _verify_block(source, index, used, embedded[0], embedded[1][index])
    if device.type == "cuda":
        torch.cuda.empty_cache()  # the placement of the streams depends on the free memory


def _verify_block(
    source: SourceModel, index: int, used: Iterable[Equivalence], hidden: Tensor, arguments: Mapping[str, Any]
) -> None:
    """Verify equivalences on one block. The block is released on return."""
    dtype = torch.float32 if hidden.device.type == "mps" else torch.float64  # Apple's GPUs have no float64
    layout = source.layout(index)
    block = VerifiedBlock(source.block(index, hidden.device, dtype), layout, hidden, arguments, dtype)
    for equivalence in used:
        if not (error := block.error(equivalence)) <= TOLERANCE[dtype]:
            raise UserError(
                f"{source.block_name(index)}: the equivalence {equivalence} changes the output of the block by "
                f"{error:.1e} of the block's residual update, and {TOLERANCE[dtype]:.0e} is allowed: remove "
                f"{equivalence.kind!r} from the equivalences of the stage, or correct its declaration in the family of "
                f"{layout.model_type}"
            )
