# SPDX-License-Identifier: Apache-2.0
"""Blocks of LLaMA's shapes with random weights, and the least work of a calibration step and of a forward.

A step on a sample of ``t`` tokens multiplies ``2 t`` times every weight of a linear forward, as often for the gradient
of the weights, and once more for that of the inputs wherever something is learned before them: everywhere but in front
of the first linears, and there too if a transform learns the norm that they read. Causal attention takes ``2 t^2 h``
forward (half of two products) and twice that backward. What must be moved: the block, a sample and its target; what is
learned and its two moments, in and out.
"""

from dataclasses import dataclass
from typing import Any

import torch
from measuring.machine import Work
from transformers import LlamaConfig, LlamaModel

from omniq.calibration.task import BlockTask
from omniq.grid.scheme import Scheme
from omniq.models.families.llama import LLAMA
from omniq.stages.modules.omniquant import OmniQuantModule


@dataclass(frozen=True)
class Shape:
    """Sizes of a model."""

    hidden: int
    inner: int
    heads: int
    kv_heads: int
    vocabulary: int

    @property
    def linears(self) -> list[tuple[int, int]]:
        """``(o, i)`` of the linears of a block, in the order of the family."""
        hidden, kv = self.hidden, self.hidden // self.heads * self.kv_heads
        attention = [(hidden, hidden), (kv, hidden), (kv, hidden), (hidden, hidden)]
        return [*attention, (self.inner, hidden), (self.inner, hidden), (hidden, self.inner)]

    def config(self, blocks: int, **more: Any) -> LlamaConfig:
        """The same for transformers."""
        return LlamaConfig(
            hidden_size=self.hidden,
            intermediate_size=self.inner,
            num_attention_heads=self.heads,
            num_key_value_heads=self.kv_heads,
            num_hidden_layers=blocks,
            **{"vocab_size": self.vocabulary, **more},
        )


SHAPES = {
    "tiny": Shape(256, 704, 4, 4, 512),
    "smollm2": Shape(576, 1536, 9, 3, 49152),
    "7b": Shape(4096, 11008, 32, 32, 32000),
    "13b": Shape(5120, 13824, 40, 40, 32000),
    "70b": Shape(8192, 28672, 64, 8, 32000),
}


def make_task(shape: str, scheme: Scheme, device: str, tokens: int, samples: int, dtype: torch.dtype) -> BlockTask:
    """A random block of the given shape with random streams."""
    torch.manual_seed(0)
    config = SHAPES[shape].config(1, vocab_size=8, attn_implementation="sdpa")
    model = LlamaModel(config).to(device, dtype).eval().requires_grad_(False)
    inputs = torch.randn(samples, tokens, config.hidden_size, device=device).to(dtype)
    cos, sin = model.rotary_emb(inputs[:1], torch.arange(tokens, device=device)[None])
    kwargs = {"attention_mask": None, "position_embeddings": (cos, sin)}

    def precision() -> Any:
        return torch.autocast(device, dtype, enabled=dtype != torch.float32, cache_enabled=False)

    block, activations = model.layers[0], scheme.activations
    layout = LLAMA.layout(block, 0)
    task = BlockTask(
        0,
        layout,
        block,
        dict.fromkeys(layout.linears, scheme.grid),
        inputs,
        inputs,
        kwargs,
        precision=precision,
        activations=activations,
    )
    task.targets = task.run(inputs)
    return task


def step_work(task: BlockTask, module: OmniQuantModule) -> Work:
    """Of a step on one sample: forward, loss, backward and AdamW."""
    sample, weights = task.inputs[0], _weights(task, task.layout.linears)
    to_inputs = weights if module.moves is not None else weights - _weights(task, task.layout.groups[0])
    learned = sum(parameter.nbytes for parameter in module.parameters() if parameter.requires_grad)
    tokens, hidden = sample.shape
    operations = 2 * tokens * (2 * weights + to_inputs) + 3 * 2 * tokens**2 * hidden
    return Work(operations, _block_bytes(task) + 2 * sample.nbytes + 2 * 3 * learned)


def forward_work(task: BlockTask, samples: int) -> Work:
    """Of sending so many samples through the block."""
    sample = task.inputs[0]
    tokens, hidden = sample.shape
    each = 2 * tokens * _weights(task, task.layout.linears) + 2 * tokens**2 * hidden
    return Work(samples * each, _block_bytes(task) + 2 * samples * sample.nbytes)


def _weights(task: BlockTask, names: tuple[str, ...]) -> int:
    return sum(task.linear(name).weight.numel() for name in names)


def _block_bytes(task: BlockTask) -> int:
    return sum(parameter.nbytes for parameter in task.block.parameters())
