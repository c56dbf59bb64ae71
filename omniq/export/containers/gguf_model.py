# SPDX-License-Identifier: Apache-2.0
"""The names of parameters in llama.cpp, the order of their rows, and the keys of the config that it reads.

llama.cpp rotates pairs of neighbouring channels where it uses the rotary embedding of LLaMA's authors, and transformers
rotates channel ``k`` with channel ``k + d / 2``. Files of architecture ``llama`` therefore hold the rows of the query
and key projections in another order (``convert_hf_to_gguf.py``, ``LlamaModel.permute``):

    row of channel k of a head of d channels:  k -> 2 k        for k < d / 2
                                               k -> 2 k - d + 1  otherwise

Only whole rows move, so codes and their groups stay as they are.

Sources: ``convert_hf_to_gguf.py`` and ``llama-arch.cpp`` of llama.cpp.
"""

import math
import re
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from transformers import PretrainedConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from omniq.errors import UserError
from omniq.export.containers.gguf_file import Value
from omniq.storage.block_result import QuantizedLinear

ARCHITECTURES = {"llama": "llama", "mistral": "llama", "qwen2": "qwen2", "qwen3": "qwen3"}
"""Architectures of llama.cpp by ``config.model_type``."""

ROPE_FACTORS = "rope_freqs.weight"
_OUTSIDE = {"model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output"}
_INSIDE = {
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}
_BIASES = {"qwen2": {"attn_q", "attn_k", "attn_v"}, "qwen3": set[str]()}  # llama.cpp refuses others; llama: all linears
_PARAMETER = re.compile(r"model\.layers\.(\d+)\.(.+)\.(weight|bias)")


def architecture_of(config: PretrainedConfig) -> str:
    """The architecture of llama.cpp for a model.

    Raises:
        UserError: omniq does not know how llama.cpp stores this model.
    """
    refusal = ""
    rope = rope_of(config)
    if config.model_type not in ARCHITECTURES:
        refusal = f"models of type {config.model_type!r}; it holds {', '.join(ARCHITECTURES)}"
    elif rope["rope_type"] not in ("default", "linear", "llama3"):
        refusal = f"the rotary embedding {rope['rope_type']!r}"
    elif rope.get("partial_rotary_factor", 1.0) != 1.0:
        refusal = "a rotary embedding of a part of the channels"
    elif getattr(config, "hidden_act", "silu") != "silu":
        refusal = f"the activation {config.hidden_act!r}"
    if refusal:
        raise UserError(f"export.format gguf does not support {refusal}: use another format")
    return ARCHITECTURES[config.model_type]


def rope_of(config: PretrainedConfig) -> dict[str, Any]:
    """The rotary embedding of a config, with its type."""
    return {"rope_type": "default", **(getattr(config, "rope_parameters", None) or {})}


def gguf_name(name: str, architecture: str) -> str:
    """The name of a parameter in llama.cpp.

    Raises:
        UserError: the architecture has no such parameter.
    """
    inside = _PARAMETER.fullmatch(name)
    if inside is not None and inside[2] in _INSIDE:
        part = _INSIDE[inside[2]]
        if inside[3] == "weight" or part in _BIASES.get(architecture, {part}):
            return f"blk.{inside[1]}.{part}.{inside[3]}"
    elif (outside := name.removesuffix(".weight")) in _OUTSIDE:
        return f"{_OUTSIDE[outside]}.weight"
    raise UserError(
        f"format gguf cannot hold {name}, because the architecture {architecture} of llama.cpp has no such parameter: "
        "use a method that creates no such parameter (for biases: turn its shift off), or format compressed-tensors"
    )


def model_name(name: str) -> str | None:
    """Invert ``gguf_name``; None for a tensor that is not a parameter of the model."""
    outside = {f"{theirs}.weight": f"{ours}.weight" for ours, theirs in _OUTSIDE.items()}
    inside = re.fullmatch(r"blk\.(\d+)\.(\w+)\.(weight|bias)", name)
    ours = {theirs: ours for ours, theirs in _INSIDE.items()}.get(inside[2]) if inside else None
    return f"model.layers.{inside[1]}.{ours}.{inside[3]}" if inside and ours else outside.get(name)


def row_order(name: str, config: PretrainedConfig, rows: int) -> Tensor | None:
    """The order in which llama.cpp expects the rows of a parameter: row ``k`` of the file is row ``order[k]`` here.

    Args:
        name: name of the parameter in the model.
        config: the config of the model.
        rows: number of rows.

    Returns:
        int64 ``[rows]``; None if the order is the same.
    """
    heads = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}.get(name.split(".")[-2])
    if ARCHITECTURES[config.model_type] != "llama" or heads is None:
        return None
    return torch.arange(rows).view(heads, 2, -1).transpose(1, 2).flatten()


def reordered(name: str, tensor: Tensor, config: PretrainedConfig, back: bool = False) -> Tensor:
    """A parameter with its rows in the order of llama.cpp, or ``back`` in that of the model."""
    order = row_order(name, config, len(tensor))
    if order is None:
        return tensor
    return tensor[order.argsort() if back else order]


def reordered_linear(
    name: str, linear: QuantizedLinear, config: PretrainedConfig, back: bool = False
) -> QuantizedLinear:
    """A quantized linear with its rows in the order of llama.cpp, or ``back`` in that of the model."""
    codes, scale, zero_point = (
        reordered(f"{name}.weight", part, config, back) for part in (linear.codes, linear.scale, linear.zero_point)
    )
    return replace(linear, codes=codes, scale=scale, zero_point=zero_point)


def rope_factors(config: PretrainedConfig) -> Tensor | None:
    """The divisors of the rotary frequencies of LLaMA 3, float32 ``[d / 2]``, which llama.cpp reads as a tensor."""
    rope = rope_of(config)
    if rope["rope_type"] != "llama3":
        return None
    scaled, _ = ROPE_INIT_FUNCTIONS["llama3"](config, torch.device("cpu"))
    width = _head_width(config)
    plain = 1.0 / rope["rope_theta"] ** (torch.arange(0, width, 2, dtype=torch.float32) / width)
    return plain / scaled


def config_metadata(config: PretrainedConfig, name: str) -> dict[str, Value]:
    """The keys by which llama.cpp reads a config.

    Args:
        config: of a model that ``architecture_of`` accepts.
        name: name of the model.
    """
    rope, architecture, width = rope_of(config), architecture_of(config), _head_width(config)
    # llama.cpp attends to the whole context, so a longer context than a sliding window would give other results
    window = getattr(config, "sliding_window", None) or math.inf
    numbers = {
        "block_count": config.num_hidden_layers,
        "context_length": min(config.max_position_embeddings, window),
        "embedding_length": config.hidden_size,
        "feed_forward_length": config.intermediate_size,
        "attention.head_count": config.num_attention_heads,
        "attention.head_count_kv": config.num_key_value_heads,
        "attention.key_length": width,
        "attention.value_length": width,
        "rope.dimension_count": width,
        "vocab_size": config.vocab_size,
    }
    reals = {"attention.layer_norm_rms_epsilon": config.rms_norm_eps, "rope.freq_base": rope.get("rope_theta", 1e4)}
    scaling: dict[str, Value] = {}
    if rope["rope_type"] == "linear":
        scaling = {"rope.scaling.type": Value.text("linear"), "rope.scaling.factor": Value.real(rope["factor"])}
    own = {key: Value.integer(int(value)) for key, value in numbers.items()}
    own |= {key: Value.real(value) for key, value in reals.items()} | scaling
    return {
        "general.architecture": Value.text(architecture),
        "general.type": Value.text("model"),
        "general.name": Value.text(name),
        **{f"{architecture}.{key}": value for key, value in own.items()},
    }


def _head_width(config: PretrainedConfig) -> int:
    """Number of channels of a head."""
    return int(getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads)
