# SPDX-License-Identifier: Apache-2.0
"""Tiny random variants of the decoder-only models of transformers, one for each structure of a block.

``zoo_model("bloom")`` is a whole model of 2 blocks (hybrids: as many as show all kinds of blocks) and 64 channels with
seeded random weights. Norms, biases and saved buffers are away from one and zero, so that a wrong order, mask or
missing tensor shows.
"""

from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

VOCAB_SIZE = 272

_BASE: dict[str, Any] = {
    "vocab_size": VOCAB_SIZE,
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 128,
    "tie_word_embeddings": False,
    "bos_token_id": 256,
    "eos_token_id": 257,
    "pad_token_id": None,
}
_GATED: dict[str, Any] = {"intermediate_size": 128, "num_key_value_heads": 2}
_HEADS: dict[str, Any] = _GATED | {"head_dim": 16}
_PLAIN: dict[str, Any] = {"intermediate_size": 128}
_EXPERTS: dict[str, Any] = _HEADS | {
    "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 64
}  # fmt: skip
_GPT2: dict[str, Any] = {"n_embd": 64, "n_layer": 2, "n_head": 4, "n_positions": 128, "n_inner": 128}
_LINEAR: dict[str, Any] = {
    "linear_num_value_heads": 4, "linear_num_key_heads": 2, "linear_key_head_dim": 16, "linear_value_head_dim": 16,
    "layer_types": ["linear_attention", "full_attention"],
}  # fmt: skip
_MLA: dict[str, Any] = {
    "intermediate_size": 128, "q_lora_rank": 32, "kv_lora_rank": 32, "qk_nope_head_dim": 16, "qk_rope_head_dim": 16,
    "v_head_dim": 32, "n_routed_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 64,
    "first_k_dense_replace": 1, "n_group": 1, "topk_group": 1, "n_shared_experts": 1, "num_key_value_heads": 4,
}  # fmt: skip
_MAMBA: dict[str, Any] = {"mamba_n_heads": 8, "mamba_d_head": 16, "mamba_d_state": 16, "mamba_n_groups": 1}
_LOCAL: dict[str, Any] = {"sliding_window": 8, "layer_types": ["sliding_attention", "full_attention"]}
_GEMMA4: dict[str, Any] = _HEADS | _LOCAL | {"global_head_dim": 32, "num_kv_shared_layers": 0}

VARIANTS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", _GATED),
    "mistral": ("mistral", _HEADS | {"sliding_window": None}),
    "mistral window": ("mistral", _HEADS | {"sliding_window": 8}),
    "ministral3": ("ministral3", _HEADS),
    "qwen2": ("qwen2", _GATED),
    "qwen2 windows": ("qwen2", _GATED | _LOCAL | {"use_sliding_window": True}),
    "qwen3": ("qwen3", _HEADS),
    "seed_oss": ("seed_oss", _HEADS),
    "internlm3": ("internlm3", _HEADS),
    "smollm3": ("smollm3", _GATED | {"no_rope_layers": [1, 0]}),
    "granite": ("granite", _GATED | {"residual_multiplier": 0.5, "attention_multiplier": 0.3}),
    "ernie4_5": ("ernie4_5", _HEADS),
    "helium": ("helium", _HEADS),
    "hunyuan_v1_dense": ("hunyuan_v1_dense", _HEADS),
    "arcee": ("arcee", _HEADS),
    "apertus": ("apertus", _HEADS),
    "gemma": ("gemma", _HEADS),
    "gemma2": ("gemma2", _HEADS | {"sliding_window": 8}),
    "gemma3_text": ("gemma3_text", _HEADS | _LOCAL),
    "vaultgemma": ("vaultgemma", _HEADS | {"sliding_window": 8}),
    "gemma4_text": ("gemma4_text", _GEMMA4 | {"hidden_size_per_layer_input": 0}),
    "gemma4_text moe": ("gemma4_text", _GEMMA4 | {
        "hidden_size_per_layer_input": 0, "enable_moe_block": True, "num_experts": 4, "top_k_experts": 2,
        "moe_intermediate_size": 64}),
    "gemma4_text e2b": ("gemma4_text", _GEMMA4 | {
        "hidden_size_per_layer_input": 16, "vocab_size_per_layer_input": VOCAB_SIZE}),
    "gemma4_text e4b": ("gemma4_text", _GEMMA4 | {
        "hidden_size_per_layer_input": 16, "vocab_size_per_layer_input": VOCAB_SIZE, "num_kv_shared_layers": 2,
        "num_hidden_layers": 4, "layer_types": ["sliding_attention", "full_attention"] * 2}),
    "gemma3n_text": ("gemma3n_text", _HEADS | _LOCAL | {
        "hidden_size_per_layer_input": 16, "vocab_size_per_layer_input": VOCAB_SIZE, "laurel_rank": 16,
        "num_kv_shared_layers": 0, "intermediate_size": [128, 128], "activation_sparsity_pattern": [0.0, 0.0]}),
    "phi": ("phi", _PLAIN | {"partial_rotary_factor": 0.5}),
    "phi3": ("phi3", _GATED),
    "phimoe": ("phimoe", _GATED | {"num_local_experts": 4, "num_experts_per_tok": 2}),
    "falcon 7b": ("falcon", {"multi_query": True, "parallel_attn": True, "new_decoder_architecture": False}),
    "falcon 11b": ("falcon", {"num_kv_heads": 2, "new_decoder_architecture": True, "num_ln_in_parallel_attn": 1}),
    "falcon 40b": ("falcon", {"num_kv_heads": 2, "new_decoder_architecture": True}),
    "falcon 180b": ("falcon", {
        "num_attention_heads": 8, "num_kv_heads": 2, "new_decoder_architecture": True, "bias": True}),
    "falcon rw": ("falcon", {"alibi": True, "multi_query": False, "parallel_attn": False, "bias": True}),
    "bloom": ("bloom", {"n_layer": 2, "n_head": 4}),
    "opt": ("opt", {"ffn_dim": 128, "word_embed_proj_dim": 64, "pad_token_id": 1, "dropout": 0.0}),
    "opt 350m": ("opt", {"ffn_dim": 128, "word_embed_proj_dim": 32, "pad_token_id": 1, "dropout": 0.0,
                         "do_layer_norm_before": False}),
    "gpt2": ("gpt2", _GPT2),
    "gpt_bigcode": ("gpt_bigcode", _GPT2),
    "gpt_neo": ("gpt_neo", _PLAIN | {"num_layers": 2, "num_heads": 4, "attention_types": [[["global", "local"], 1]],
                                     "window_size": 8}),
    "gptj": ("gptj", _GPT2 | {"rotary_dim": 8}),
    "codegen": ("codegen", _GPT2 | {"rotary_dim": 8}),
    "gpt_neox": ("gpt_neox", _PLAIN),
    "gpt_neox sequential": ("gpt_neox", _PLAIN | {"use_parallel_residual": False}),
    "mpt": ("mpt", {"d_model": 64, "n_layers": 2, "n_heads": 4, "max_seq_len": 128, "expansion_ratio": 2}),
    "stablelm": ("stablelm", _GATED | {"partial_rotary_factor": 0.5}),
    "stablelm parallel": ("stablelm", _GATED | {"use_parallel_residual": True, "qk_layernorm": True}),
    "starcoder2": ("starcoder2", _GATED),
    "nemotron": ("nemotron", _HEADS),
    "persimmon": ("persimmon", _PLAIN),
    "cohere": ("cohere", _GATED),
    "cohere2": ("cohere2", _GATED | _LOCAL),
    "olmo": ("olmo", _GATED),
    "olmo2": ("olmo2", _GATED),
    "olmo3": ("olmo3", _GATED | _LOCAL),
    "exaone4": ("exaone4", _GATED | _LOCAL),
    "glm": ("glm", _HEADS),
    "glm4": ("glm4", _HEADS),
    "mixtral": ("mixtral", _HEADS | {"num_local_experts": 4, "num_experts_per_tok": 2}),
    "qwen2_moe": ("qwen2_moe", _EXPERTS | {"shared_expert_intermediate_size": 64}),
    "qwen3_moe": ("qwen3_moe", _EXPERTS),
    "olmoe": ("olmoe", _EXPERTS),
    "minimax_m2": ("minimax_m2", _HEADS | {"num_local_experts": 4, "num_experts_per_tok": 2}),
    "hunyuan_v1_moe": ("hunyuan_v1_moe", _HEADS | {"num_experts": 4, "moe_topk": [2, 2]}),
    "ernie4_5_moe": ("ernie4_5_moe", _HEADS | {
        "moe_num_experts": 4, "moe_k": 2, "moe_intermediate_size": 64, "moe_layer_start_index": 1,
        "moe_num_shared_experts": 1}),
    "lfm2_moe": ("lfm2_moe", _EXPERTS | {"num_dense_layers": 1, "layer_types": ["conv", "full_attention"]}),
    "glm4_moe": ("glm4_moe", _EXPERTS | {"n_routed_experts": 4, "first_k_dense_replace": 1}),
    "dots1": ("dots1", _EXPERTS | {"n_routed_experts": 4, "n_shared_experts": 1, "first_k_dense_replace": 1,
                                   "num_key_value_heads": 4, "layer_types": ["full_attention"] * 2}),
    "exaone_moe": ("exaone_moe", _EXPERTS | _LOCAL | {
        "first_k_dense_replace": 1, "is_moe_layer": [False, True], "mlp_layer_types": ["dense", "sparse"]}),
    "afmoe": ("afmoe", _EXPERTS | _LOCAL | {"num_dense_layers": 1, "num_shared_experts": 1}),
    "qwen3_next": ("qwen3_next", _EXPERTS | _LINEAR | {"shared_expert_intermediate_size": 64}),
    "qwen3_5_text": ("qwen3_5_text", _HEADS | _LINEAR),
    "qwen3_5_moe_text": ("qwen3_5_moe_text", _EXPERTS | _LINEAR | {"shared_expert_intermediate_size": 64}),
    "deepseek_v2": ("deepseek_v2", _MLA),
    "deepseek_v3": ("deepseek_v3", _MLA),
    "gpt_oss": ("gpt_oss", _HEADS | _LOCAL | {"num_local_experts": 4, "num_experts_per_tok": 2}),
    "granitemoe": ("granitemoe", _GATED | {"num_local_experts": 4, "num_experts_per_tok": 2}),
    "granitemoehybrid": ("granitemoehybrid", _GATED | _MAMBA | {
        "num_local_experts": 4, "num_experts_per_tok": 2, "shared_intermediate_size": 64,
        "layer_types": ["mamba", "attention"]}),
    "llama4_text": ("llama4_text", _HEADS | {
        "num_local_experts": 4, "interleave_moe_layer_step": 2, "intermediate_size_mlp": 128,
        "attention_chunk_size": 32}),
    "dbrx": ("dbrx", {
        "d_model": 64, "n_heads": 4, "n_layers": 2, "max_seq_len": 128,
        "attn_config": {"kv_n_heads": 2, "rope_theta": 1e4, "clip_qkv": 8.0},
        "ffn_config": {"ffn_hidden_size": 64, "hidden_size": 64, "moe_num_experts": 4, "moe_top_k": 2}}),
    "minimax": ("minimax", _HEADS | {
        "num_local_experts": 4, "num_experts_per_tok": 2, "block_size": 32,
        "layer_types": ["linear_attention", "full_attention"]}),
    "mamba": ("mamba", {"state_size": 8, "time_step_rank": 32}),
    "mamba2": ("mamba2", {"state_size": 16, "num_heads": 8, "head_dim": 16, "n_groups": 1, "chunk_size": 16}),
    "bamba": ("bamba", _GATED | _MAMBA | {"mamba_chunk_size": 16, "attn_layer_indices": [1]}),
    "nemotron_h": ("nemotron_h", _HEADS | {
        "mamba_num_heads": 8, "mamba_head_dim": 16, "ssm_state_size": 16, "n_groups": 1, "chunk_size": 16,
        "num_hidden_layers": 3, "layers_block_type": ["mamba", "attention", "mlp"]}),
    "jamba": ("jamba", _GATED | {
        "num_experts": 4, "num_experts_per_tok": 2, "attn_layer_period": 2, "attn_layer_offset": 1,
        "expert_layer_period": 2, "expert_layer_offset": 1, "mamba_d_state": 8, "mamba_dt_rank": 32}),
    "lfm2": ("lfm2", _HEADS | {"layer_types": ["conv", "full_attention"]}),
    "recurrent_gemma": ("recurrent_gemma", _PLAIN | {
        "num_key_value_heads": 1, "lru_width": 64, "attention_window_size": 32, "num_hidden_layers": 3}),
    "falcon_h1": ("falcon_h1", _HEADS | _MAMBA | {"mamba_d_ssm": 128, "mamba_chunk_size": 16}),
    "bitnet": ("bitnet", _GATED),
    "nanochat": ("nanochat", _GATED),
    "doge": ("doge", _GATED),
    "diffllama": ("diffllama", _GATED),
    "biogpt": ("biogpt", _PLAIN | {"pad_token_id": 1}),
    "xglm": ("xglm", {"d_model": 64, "ffn_dim": 128, "num_layers": 2, "attention_heads": 4, "pad_token_id": 1}),
}  # fmt: skip


def zoo_config(name: str) -> Any:
    """The config of a variant."""
    kind, own = VARIANTS[name]
    return AutoConfig.for_model(kind, **{**_BASE, **own})


@torch.no_grad()
def zoo_model(name: str, seed: int = 0) -> PreTrainedModel:
    """A variant with random weights in float32, in evaluation mode.

    Matrices keep the variance of their input. Vectors and buffers that are saved are moved a little from the values
    that transformers gives them.
    """
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(zoo_config(name), dtype=torch.float32).eval()
    generator = torch.Generator().manual_seed(seed)
    for key, value in model.state_dict().items():
        if not value.is_floating_point():
            continue
        noise = torch.randn(value.shape, generator=generator)
        if value.dim() < 2 or "conv" in key:
            value.add_(0.1 * noise)
        else:
            value.copy_(noise if "embed" in key or "wte" in key else noise / value.shape[-1] ** 0.5)
    return model
