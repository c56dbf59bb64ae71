# SPDX-License-Identifier: Apache-2.0
"""A checkpoint of random weights, as a user's lies on disk, of any size and written with one block in memory."""

import json
from pathlib import Path

import torch
from measuring.llama import SHAPES
from safetensors.torch import save_file
from tokenizers import Tokenizer, pre_tokenizers
from tokenizers.models import BPE
from transformers import LlamaForCausalLM, PreTrainedTokenizerFast


def write_checkpoint(folder: Path, shape: str, blocks: int, length: int, dtype: torch.dtype) -> None:
    """A random LLaMA, one file a block, and a tokenizer of bytes; one block in memory at a time."""
    config = SHAPES[shape].config(blocks, max_position_embeddings=length, dtype=dtype)
    config.architectures = ["LlamaForCausalLM"]
    config.save_pretrained(folder)
    with torch.device("meta"):
        shapes = {name: tuple(value.shape) for name, value in LlamaForCausalLM(config).state_dict().items()}
    generator = torch.Generator().manual_seed(0)
    made: dict[tuple[int, ...], torch.Tensor] = {}
    for size in set(shapes.values()):
        noise = torch.randn(size, generator=generator) / size[-1] ** 0.5 if len(size) == 2 else torch.ones(size)
        made[size] = noise.to(dtype)
    files: dict[str, list[str]] = {}
    for name in shapes:
        block = name.split(".")[2] if name.startswith("model.layers.") else "outside"
        files.setdefault(f"block-{block}.safetensors", []).append(name)
    for file, names in files.items():
        save_file({name: made[shapes[name]].clone() for name in names}, folder / file)
    weight_map = {name: file for file, names in files.items() for name in names}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    letters = {letter: index for index, letter in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    tokenizer = Tokenizer(BPE(vocab=letters, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    PreTrainedTokenizerFast(tokenizer_object=tokenizer).save_pretrained(folder)
