# SPDX-License-Identifier: Apache-2.0
"""The tensors of a block, and how quantized weights and transformed tensors are loaded into it."""

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from omniq.storage.block_result import BlockResult


def block_tensors(block: nn.Module) -> dict[str, Tensor]:
    """All parameters and saved buffers of a block by name, detached."""
    return {name: value.detach() for name, value in block.state_dict().items()}


def load_quantized_weights(block: nn.Module, result: BlockResult) -> None:
    """Load the weights of the exported model into a block: dequantize the codes on the device of the block."""
    for name, value in result.dequantized(device=next(block.parameters()).device):
        set_tensors(block, {name: value})


@torch.no_grad()
def set_tensors(block: nn.Module, tensors: Mapping[str, Tensor]) -> None:
    """Copy tensors into a block and keep its dtypes. A bias that a transform created is added to its linear.

    Raises:
        KeyError: a name is neither a tensor of the block nor the bias of one of its linears.
    """
    own = block_tensors(block)
    for name, value in tensors.items():
        if name in own:
            own[name].copy_(value)
            continue
        owner, _, last = name.rpartition(".")
        linear = block.get_submodule(owner)
        if last != "bias" or not isinstance(linear, nn.Linear):
            raise KeyError(f"{name} is neither a tensor of the block nor the bias of one of its linears")
        linear.bias = nn.Parameter(value.to(linear.weight, copy=True), requires_grad=False)
