# SPDX-License-Identifier: Apache-2.0
"""Check that a finished block computes finite numbers in the dtype of the export.

Activations of some models (Qwen2, Gemma and Phi among them) exceed the range of float16. Such a model reaches a good
loss when it is calibrated in float32, and computes NaN after an export in float16. omniq therefore runs each block once
in the export dtype, on the sample with the largest input, before the block counts as finished.
"""

import copy
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from omniq.blocks.activation_hooks import quantized_activations
from omniq.blocks.forward import call_block
from omniq.blocks.placement import gather_samples
from omniq.distributed import collectives
from omniq.grid.scheme import Scheme
from omniq.models.layout import Layout
from omniq.storage.block_result import BlockResult


@torch.no_grad()
def check_export_dtype(
    name: str,
    block: nn.Module,
    layout: Layout,
    result: BlockResult,
    scheme: Scheme,
    stream: Tensor,
    kwargs: Mapping[str, Any],
) -> None:
    """Refuse a block whose output is not finite in the dtype of the export.

    Args:
        name: full name of the block, for the message.
        block: the block with its quantized weights.
        layout: the layout of the block.
        result: the result of the block, which holds the ranges of its inputs.
        scheme: the scheme, with the export dtype and the quantization of activations.
        stream: the inputs of the block in the quantized model, ``[n, t, h]``.
        kwargs: the other arguments of the block's forward.

    Raises:
        UserError: the output is not finite on at least one process. All processes raise. The message names the block,
            the dtype and the remedy.
    """
    dtype, device = scheme.export_dtype, next(block.parameters()).device
    finite = True
    if dtype != next(block.parameters()).dtype:
        largest = torch.stack([sample.abs().amax() for sample in stream]).argmax()
        sample = gather_samples(stream, slice(int(largest), int(largest) + 1), device)
        exported = copy.deepcopy(block).to(dtype)
        with quantized_activations(exported, layout, scheme.activations, result.linears):
            finite = bool(call_block(exported, sample.to(dtype), _in_dtype(dict(kwargs), dtype)).isfinite().all())
    if not collectives.all_ranks(finite):
        raise collectives.error_on_rank0(
            f"{name}: activations exceed the range of scheme.dtype {scheme.dtype}, in which the model is exported: "
            "set scheme.dtype to bfloat16"
        )


def _in_dtype(value: Any, dtype: torch.dtype) -> Any:
    """Convert every floating-point tensor in nested containers to ``dtype``."""
    if isinstance(value, Tensor):
        return value.to(dtype) if value.is_floating_point() else value
    if isinstance(value, dict):
        return {key: _in_dtype(each, dtype) for key, each in value.items()}
    return type(value)(_in_dtype(each, dtype) for each in value) if isinstance(value, (tuple, list)) else value
