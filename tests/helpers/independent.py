# SPDX-License-Identifier: Apache-2.0
"""An export compared with its source by code that shares nothing with omniq's exporter.

``dequantized_source`` unpacks the codes of a ``pack-quantized`` folder, writes ``(q - z) * s`` into a copy of the
source checkpoint, and opens the copy with stock transformers.

Shapes: ``o`` output features, ``i`` input features, ``G`` groups.
"""

import json
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel


def bits_of(words: Tensor, bits: int, count: int) -> Tensor:
    """The first ``count`` integers of ``bits`` bits in each row, lowest bits first: ``[rows, count]``."""
    shifts = torch.arange(32, dtype=torch.int64)
    stream = (words.to(torch.int64)[..., None] >> shifts) & 1  # [rows, words, 32]
    stream = stream.flatten(1)[:, : bits * count].unflatten(1, (count, bits))
    return (stream << torch.arange(bits, dtype=torch.int64)).sum(-1)


def dequantized(stored: dict[str, Tensor], name: str, bits: int) -> Tensor:
    """``(q - z) * s`` of one linear, float32 ``[o, i]``."""
    outputs, inputs = stored[f"{name}.weight_shape"].tolist()
    scale = stored[f"{name}.weight_scale"].float()  # [o, G]
    codes = bits_of(stored[f"{name}.weight_packed"], bits, inputs).float()
    zero = torch.full_like(scale, 2 ** (bits - 1))
    if f"{name}.weight_zero_point" in stored:  # packed along the outputs
        zero = bits_of(stored[f"{name}.weight_zero_point"].T, bits, outputs).T.float()
    size = inputs // scale.shape[1]
    return (codes - zero.repeat_interleave(size, 1)) * scale.repeat_interleave(size, 1)


def stored_tensors(folder: Path) -> dict[str, Tensor]:
    """All tensors of a checkpoint."""
    return {key: value for file in sorted(folder.glob("*.safetensors")) for key, value in load_file(file).items()}


def dequantized_source(source: Path, export: Path, folder: Path) -> tuple[PreTrainedModel, int]:
    """The source model with the dequantized weights of an export, and the number of its quantized linears.

    Args:
        source, export: the folders of both checkpoints. In the export, linears have the names of stored experts or of
            modules.
        folder: an empty folder for the copy.
    """
    config = json.loads((export / "config.json").read_text())["quantization_config"]
    (group,) = config["config_groups"].values()
    stored, weights = stored_tensors(export), stored_tensors(source)
    names = [key.removesuffix(".weight_packed") for key in stored if key.endswith(".weight_packed")]
    stored_as = {f"{name}.weight": _stored_name(f"{name}.weight", weights) for name in names}
    values = {stored_as[f"{name}.weight"]: dequantized(stored, name, group["weights"]["num_bits"]) for name in names}
    weights |= {key: value.to(weights[key].dtype) for key, value in values.items() if key in weights}
    folder.mkdir()
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    (folder / "config.json").write_text((source / "config.json").read_text())
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    for key in values.keys() - weights.keys():  # its name in the source is not that of the module
        model.get_parameter(key).data.copy_(values[key])
    return model, len(names)


def _stored_name(name: str, weights: dict[str, Tensor]) -> str:
    """The name of a weight in the source: Mixtral and MiniMax store experts under another name than its module."""
    other = name.replace(".mlp.experts.", ".block_sparse_moe.experts.")
    return other if other in weights else name


@torch.no_grad()
def relative_error(found: PreTrainedModel, expected: PreTrainedModel, tokens: Tensor) -> float:
    """``|| found - expected || / || expected ||`` of the logits of tokens ``[n, t]``."""
    ours, theirs = (model(tokens, use_cache=False).logits.double() for model in (found, expected))
    return float((ours - theirs).norm() / theirs.norm())
