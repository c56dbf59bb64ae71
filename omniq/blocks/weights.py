# SPDX-License-Identifier: Apache-2.0
"""Load quantized weights, and transformed tensors, into a block."""

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from omniq.storage.block_result import BlockResult


def load_quantized_weights(block: nn.Module, result: BlockResult) -> None:
    """Load the weights of the exported model into a block: dequantize the codes on the device of the block."""
    for name, value in result.dequantized(device=next(block.parameters()).device):
        set_tensors(block, {name: value})


@torch.no_grad()
def set_tensors(block: nn.Module, tensors: Mapping[str, Tensor]) -> None:
    """Copy parameters into a block and keep its dtype. A bias that a transform created is added to its linear.

    Raises:
        KeyError: a name is neither a parameter of the block nor the bias of one of its linears.
    """
    parameters = dict(block.named_parameters())
    for name, value in tensors.items():
        if name in parameters:
            parameters[name].copy_(value)
            continue
        owner, _, last = name.rpartition(".")
        linear = block.get_submodule(owner)
        if last != "bias" or not isinstance(linear, nn.Linear):
            raise KeyError(f"{name} is neither a parameter of the block nor the bias of one of its linears")
        linear.bias = nn.Parameter(value.to(linear.weight, copy=True), requires_grad=False)
