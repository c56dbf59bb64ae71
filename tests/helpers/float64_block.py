# SPDX-License-Identifier: Apache-2.0
"""Blocks of all head layouts in float64, in which an equivalent transform leaves the output unchanged."""

from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.overrides import TorchFunctionMode

from omniq.models.families import family_of_type
from omniq.transforms.equivalence import Equivalence
from omniq.transforms.transform import Transform
from tests.helpers.tiny import HALF_TURNED, tiny_block

NINE = {"hidden_size": 72, "num_attention_heads": 9}
NEW_DECODER = {"new_decoder_architecture": True, "num_kv_heads": 2}
FALCON_RW = {"alibi": True, "multi_query": False, "parallel_attn": False}
BLOCKS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama 1 of 9": ("llama", {**NINE, "num_key_value_heads": 1}),
    "llama 3 of 9": ("llama", {**NINE, "num_key_value_heads": 3}),
    "llama 9 of 9": ("llama", {**NINE, "num_key_value_heads": 9}),
    "llama with biases": ("llama", {"attention_bias": True, "mlp_bias": True}),
    "llama with a partial rotary factor": ("llama", HALF_TURNED),
    "mistral": ("mistral", {}),
    "qwen2": ("qwen2", {}),
    "qwen3": ("qwen3", {}),
    "phi3": ("phi3", {}),
    "phi3 that turns half of a head": ("phi3", HALF_TURNED),
    "gemma": ("gemma", {}),
    "gemma3": ("gemma3_text", {}),
    "opt": ("opt", {}),
    "mixtral": ("mixtral", {}),
    "qwen2-moe": ("qwen2_moe", {}),
    "qwen3-moe": ("qwen3_moe", {}),
    "olmoe": ("olmoe", {}),
    "opt 350m": ("opt", {"do_layer_norm_before": False}),
    "granite": ("granite", {}),
    "smollm3": ("smollm3", {}),
    "olmo2": ("olmo2", {}),
    "olmo3": ("olmo3", {}),
    "gpt-neox": ("gpt_neox", {}),
    "bloom": ("bloom", {}),
    "falcon 7b": ("falcon", {"bias": False}),
    "falcon 11b": ("falcon", NEW_DECODER | {"num_ln_in_parallel_attn": 1}),
    "falcon 40b": ("falcon", NEW_DECODER),
    "falcon rw": ("falcon", FALCON_RW),
}


class OffsetNorm(nn.Module):
    """Gemma's norm, computed in float64."""

    def __init__(self, weight: Tensor, eps: float) -> None:
        super().__init__()
        self.weight, self.eps = nn.Parameter(weight.double(), requires_grad=False), eps

    def forward(self, x: Tensor) -> Tensor:
        return x / (x.square().mean(-1, keepdim=True) + self.eps).sqrt() * (1 + self.weight)


class WideSoftmax(TorchFunctionMode):
    """Lets every softmax compute in float64; BLOOM asks for float32."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        wide = {"dtype": torch.float64} if getattr(func, "__name__", "") == "softmax" else {}
        return func(*args, **{**(kwargs or {}), **wide})


class Float64Block:
    """A tiny Hugging Face block in float64, ready to run with other tensors."""

    def __init__(self, kind: str, **overrides: Any) -> None:
        block, kwargs = tiny_block(kind, **overrides)
        self.block = block.double()
        # Hugging Face's RMSNorms compute in float32 whatever comes in; torch's is the same function and does not.
        for name, module in list(block.named_modules()):
            if type(module).__name__.startswith("Gemma") and type(module).__name__.endswith("RMSNorm"):
                block.set_submodule(name, OffsetNorm(module.weight, module.eps))
            elif type(module).__name__.endswith("RMSNorm"):
                norm = nn.RMSNorm(module.weight.shape[0], eps=module.variance_epsilon, dtype=torch.float64)
                norm.load_state_dict(module.state_dict())
                block.set_submodule(name, norm)
        self.kwargs = {key: _double(value) for key, value in kwargs.items()}
        self.layout = family_of_type(kind).layout(block, 0)
        self.heads, self.equivalences = self.layout.heads, self.layout.equivalences
        self.tensors = {name: value.detach() for name, value in block.named_parameters()}

    def hidden(self, seed: int = 0) -> Tensor:
        width = self.tensors[f"{self.layout.linears[0]}.weight"].shape[1]
        return torch.randn(2, 16, width, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))

    def run(self, tensors: dict[str, Tensor], seed: int = 0) -> Tensor:
        with WideSoftmax():
            output = functional_call(self.block, tensors, (self.hidden(seed),), self.kwargs)
        return output[0] if isinstance(output, tuple) else output

    def change(self, equivalences: tuple[Equivalence, ...], seed: int = 0, **options: Any) -> float:
        """Relative change of the output under a random transform."""
        transform = Transform(equivalences, self.heads, self.tensors, **options)
        moved = transform.apply(self.tensors, random_parameters(transform, seed))
        before = self.run(self.tensors, seed)
        return ((self.run(moved, seed) - before).norm() / before.norm()).item()


def _double(value: Any) -> Any:
    if isinstance(value, tuple):
        return tuple(map(_double, value))
    return value.double() if isinstance(value, Tensor) and value.is_floating_point() else value


def random_parameters(transform: Transform, seed: int = 0) -> dict[str, Tensor]:
    """Random parameters of a transform in float64."""
    draw = torch.Generator().manual_seed(seed)
    return {name: torch.randn(shape, generator=draw).double() for name, shape in transform.shapes.items()}


_OPENED: dict[str, Float64Block] = {}


def float64_block(label: str) -> Float64Block:
    """The block of a label, made once."""
    kind, overrides = BLOCKS[label]
    if label not in _OPENED:
        _OPENED[label] = Float64Block(kind, **overrides)
    return _OPENED[label]
