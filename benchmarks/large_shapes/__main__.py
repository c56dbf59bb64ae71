# SPDX-License-Identifier: Apache-2.0
"""Write a checkpoint with random weights and the block of a large model, to time a run on one GPU.

    python benchmarks/large_shapes falcon-180b build/falcon-180b --blocks 2
    omniq quantize --config configs/quantease-w3a16.yaml --model.path build/falcon-180b --export.format none \
        --data.samples 128 --data.length 2048 --trainer.precision bf16-mixed

``config.json`` is that of the model with fewer blocks and a small vocabulary, so that embedding and head take little.
One tensor at a time is drawn and written to a shard of its own: two blocks of Falcon-180B take 4 GB of memory and
9 GB on disk. A linear keeps the variance of its input. The tokenizer has one token for each byte.
"""

import argparse
import json
from pathlib import Path

import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer, decoders, pre_tokenizers
from tokenizers.models import BPE
from transformers import AutoConfig, AutoModelForCausalLM, PretrainedConfig, PreTrainedTokenizerFast

VOCABULARY = 1024  # 256 bytes, <s>, </s>, and tokens that no text has
SHAPES = {
    "falcon-180b": {
        "model_type": "falcon",
        "hidden_size": 14848,
        "num_attention_heads": 232,
        "num_kv_heads": 8,
        "new_decoder_architecture": True,
        "tie_word_embeddings": False,
    },
    "llama-3-70b": {
        "model_type": "llama",
        "hidden_size": 8192,
        "intermediate_size": 28672,
        "num_attention_heads": 64,
        "num_key_value_heads": 8,
        "max_position_embeddings": 8192,
    },
    "mixtral-8x7b": {
        "model_type": "mixtral",
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "num_local_experts": 8,
        "num_experts_per_tok": 2,
    },
}


def config_of(shape: str, blocks: int) -> PretrainedConfig:
    """The config of a model with the block of a large one."""
    settings = dict(SHAPES[shape])
    kind = str(settings.pop("model_type"))
    sizes = {"num_hidden_layers": blocks, "vocab_size": VOCABULARY, "bos_token_id": 256, "eos_token_id": 257}
    return AutoConfig.for_model(kind, **settings, **sizes, dtype="bfloat16")


def write_weights(config: PretrainedConfig, folder: Path, device: torch.device) -> None:
    """Draw every parameter and write it to a shard of its own, in bfloat16."""
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    generator = torch.Generator(device).manual_seed(0)
    shards: dict[str, str] = {}
    size = 0
    for number, (name, value) in enumerate(model.state_dict().items()):
        tensor = torch.empty(value.shape, dtype=torch.bfloat16, device=device).normal_(generator=generator)
        if value.dim() > 1:
            tensor /= value.shape[-1] ** 0.5
        else:
            tensor = 0.1 * tensor + name.endswith("weight")  # norms near 1, biases near 0
        shards[name] = f"model-{number:05d}.safetensors"
        save_file({name: tensor.cpu()}, folder / shards[name], {"format": "pt"})
        size += tensor.nbytes
    index = {"metadata": {"total_size": size}, "weight_map": shards}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def write_tokenizer(folder: Path) -> None:
    """A tokenizer with one token for each byte."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(BPE(vocab={letter: index for index, letter in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>").save_pretrained(folder)


def main() -> None:
    """Write the checkpoint."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("shape", choices=list(SHAPES))
    parser.add_argument("folder", type=Path)
    parser.add_argument("--blocks", type=int, default=2, help="number of blocks")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="draws the numbers")
    arguments = parser.parse_args()
    arguments.folder.mkdir(parents=True, exist_ok=True)
    config = config_of(arguments.shape, arguments.blocks)
    config.save_pretrained(arguments.folder)
    write_weights(config, arguments.folder, torch.device(arguments.device))
    write_tokenizer(arguments.folder)


if __name__ == "__main__":
    main()
