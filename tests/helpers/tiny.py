# SPDX-License-Identifier: Apache-2.0
"""Tiny random models and a byte-level tokenizer for the tests.

``tiny_model("llama")`` is a whole Hugging Face model of 2 blocks and 64 channels; ``save_tiny(folder)`` writes one with
its tokenizer, as a user's checkpoint lies on disk. Weights are seeded and of ordinary size (a linear keeps the variance
of its input), norms and biases are away from one and zero, so that a wrong order, mask or missing bias shows.
"""

from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, pre_tokenizers
from tokenizers.models import BPE
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerFast

from omniq.models.embedding_and_head import RepeatedArguments
from omniq.models.families import family_of_type
from omniq.models.layout import Layout
from tests.helpers.linear_experts import with_linear_experts

# A config in which only half of the channels of each head are turned.
HALF_TURNED = {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.5}}
VOCAB_SIZE = 272  # 256 bytes, <s>, </s>, and a few never used

_SIZES: dict[str, Any] = {
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "vocab_size": VOCAB_SIZE,
    "max_position_embeddings": 128,
    "tie_word_embeddings": False,
    "bos_token_id": 256,
    "eos_token_id": 257,
    "pad_token_id": None,
}
_ROTARY = {"intermediate_size": 128, "num_key_value_heads": 2}  # grouped-query attention: 2 query heads a KV head
_EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 64, "output_router_logits": False}
_OWN: dict[str, dict[str, Any]] = {
    "llama": _ROTARY,
    "mistral": _ROTARY | {"sliding_window": None, "head_dim": 16},
    "qwen2": _ROTARY,
    "qwen3": _ROTARY | {"head_dim": 16},
    "phi3": _ROTARY,
    "gemma": _ROTARY | {"head_dim": 16},
    "gemma2": _ROTARY | {"head_dim": 16, "sliding_window": 8},
    "gemma3_text": _ROTARY | {"head_dim": 16, "sliding_window": 8},
    "bloom": {"n_layer": 2, "n_head": 4},
    "falcon": {"ffn_hidden_size": 128, "bias": True},
    "granite": _ROTARY | {"residual_multiplier": 0.5, "attention_multiplier": 0.3},
    "smollm3": _ROTARY | {"num_hidden_layers": 4},  # the last of four blocks has no rotary embedding
    "olmo2": _ROTARY,
    "olmo3": _ROTARY | {"sliding_window": 8},
    "gpt_neox": {"intermediate_size": 128},
    "mixtral": _ROTARY | {"num_local_experts": 4},
    "qwen2_moe": _ROTARY | _EXPERTS | {"shared_expert_intermediate_size": 64, "mlp_only_layers": [1]},
    "qwen3_moe": _ROTARY | _EXPERTS | {"head_dim": 16},
    "olmoe": _ROTARY | _EXPERTS,
    "opt": {"ffn_dim": 128, "word_embed_proj_dim": 64, "pad_token_id": 1, "dropout": 0.0},
}


def tiny_model(family: str = "llama", seed: int = 0, **overrides: Any) -> PreTrainedModel:
    """A random model in float32, in evaluation mode.

    Args:
        family: ``config.model_type``: one of those in ``_OWN``.
        seed: of the weights.
        overrides: keys of the family's config, such as ``num_hidden_layers=3``, ``attention_bias=True``.
    """
    config = AutoConfig.for_model(family, **{**_SIZES, **_OWN[family], **overrides})
    model = AutoModelForCausalLM.from_config(config).eval()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            if parameter.dim() > 1:
                parameter.copy_(noise / parameter.shape[-1] ** 0.5 if "embed" not in name else noise)
            else:
                parameter.copy_(0.1 * noise + (("norm" in name or "ln_" in name) and name.endswith("weight")))
    return model


def tiny_tokenizer() -> PreTrainedTokenizerFast:
    """Bytes as tokens, any text, no loss; ``<s>`` is 256 and ``</s>`` 257; nothing is added to a text."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(BPE(vocab={letter: index for index, letter in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>")


def save_tiny(
    folder: Path,
    family: str = "llama",
    dtype: torch.dtype = torch.float32,
    max_shard_size: str = "1GB",
    seed: int = 0,
    **overrides: Any,
) -> Path:
    """Write a tiny model and its tokenizer as a checkpoint folder, and return the folder.

    Args:
        max_shard_size: such as ``"50KB"``, for several safetensors files and an index.
    """
    model = tiny_model(family, seed, **overrides).to(dtype)
    model.save_pretrained(folder, max_shard_size=max_shard_size)
    tiny_tokenizer().save_pretrained(folder)
    return Path(folder)


def tiny_block(family: str = "llama", seed: int = 0, length: int = 16, **overrides: Any) -> tuple[nn.Module, dict]:
    """The first block of a tiny model, frozen, and the keyword arguments it is called with for ``length`` tokens."""
    model = with_linear_experts(tiny_model(family, seed, **overrides))
    seen: dict[str, Any] = {}
    described = family_of_type(family)
    blocks = model.get_submodule(described.blocks)
    handle = blocks[0].register_forward_pre_hook(lambda _, args, kwargs: seen.update(kwargs), with_kwargs=True)
    model(torch.arange(length)[None], use_cache=False)
    handle.remove()
    blocks[0].register_forward_pre_hook(RepeatedArguments(described.batched), with_kwargs=True)
    return blocks[0], seen


def tiny_layout(family: str = "llama") -> Layout:
    """The layout of the first block of a tiny model."""
    return family_of_type(family).layout(tiny_block(family)[0], 0)
