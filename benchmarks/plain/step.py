# SPDX-License-Identifier: Apache-2.0
"""The step of OmniQuant written plainly: what ``benchmarks/block_step.py`` compares with.

The same algorithm in differentiable torch, arranged as in the published code: every weight in float32, transformed,
ranged and quantized by autograd; every linear quantizes its own input, even a shared one; attention with its scores in
memory; every loss read back. Activations take ``quantize_tokens_reference`` (analytic gradient, unfused): plain
autograd of that in float16 overflows at small scales, and losses could not be compared.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call
from transformers import AttentionInterface
from transformers.models.llama.modeling_llama import eager_attention_forward

from omniq.calibration.task import BlockTask
from omniq.kernels.fake_quant import fake_quantize_reference
from omniq.quantizers.activations import quantize_tokens_reference
from omniq.stages.modules.omniquant import OmniQuantModule
from omniq.stages.omniquant import OmniQuant


class Eager:
    """A step on one block.

    Args:
        task: the block; what the transform starts from is fused into it.
        settings: of the stage.
    """

    def __init__(self, task: BlockTask, settings: OmniQuant) -> None:
        self.module = OmniQuantModule(task, settings).to(task.device)
        groups = self.module.parameter_groups()
        self.optimizer = torch.optim.AdamW(groups, weight_decay=0.0, foreach=False)
        self.scaler = torch.amp.GradScaler(enabled=task.inputs.dtype == torch.float16)

    def loss(self, inputs: Tensor, targets: Tensor) -> Tensor:
        """Forward with reference fake quantization and eager attention."""
        task, tensors = self.module.task, self.module.tensors()
        for name in task.layout.linears:
            clip, weight = self.module.clip(name), tensors[f"{name}.weight"]
            bounds = (clip.lo, clip.hi) if self.module.transform is None else None
            tensors[f"{name}.weight"] = fake_quantize_reference(
                weight.float(), clip.upper, clip.lower, clip.grid, bounds, inputs.dtype
            )
        tokens = inputs.shape[1]
        mask = torch.full((tokens, tokens), torch.finfo(inputs.dtype).min, device=inputs.device).triu(1)[None, None]
        kwargs = {**task.kwargs, "attention_mask": mask.to(inputs.dtype)}
        with plain_activations(task, inputs.dtype):
            output = functional_call(task.block, tensors, (inputs,), kwargs)
        return nn.functional.mse_loss(output.float(), targets.float())

    def step(self, inputs: Tensor, targets: Tensor) -> float:
        """One update; the loss is read back, as the published code does."""
        self.optimizer.zero_grad()
        loss = self.loss(inputs, targets)
        self.scaler.scale(loss).backward()
        self.scaler.step(self.optimizer)
        self.scaler.update()
        return loss.item()


@contextmanager
def plain_activations(task: BlockTask, dtype: torch.dtype) -> Iterator[None]:
    """While this is entered, the block has eager attention, and quantizes activations as its task says, unfused."""
    given = task.activations

    def quantized(x: Tensor, bits: int) -> Tensor:
        return x if bits == 16 else quantize_tokens_reference(x.to(dtype), bits, given.symmetric)

    def attention(module: nn.Module, query: Tensor, key: Tensor, value: Tensor, *args: Any, **kwargs: Any) -> Any:
        query, key, value = (
            quantized(each, bits)
            for each, bits in ((query, given.queries), (key, given.keys_values), (value, given.keys_values))
        )
        return eager_attention_forward(module, query, key, value, *args, **kwargs)

    AttentionInterface.register("plain", attention)
    config = task.block.self_attn.config
    before, config._attn_implementation = config._attn_implementation, "plain"
    hooks = [
        task.linear(name).register_forward_pre_hook(lambda _, args: (quantized(args[0], given.inputs), *args[1:]))
        for name in task.layout.linears
    ]
    try:
        yield
    finally:
        config._attn_implementation = before
        for hook in hooks:
            hook.remove()
