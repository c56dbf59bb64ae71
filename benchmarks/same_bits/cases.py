# SPDX-License-Identifier: Apache-2.0
"""The tiny runs by name, the moments at which some are killed, and the tiny models and text that they read.

A case says what differs from a llama of two blocks, four windows of 24 tokens, perplexity, and compressed-tensors.
Cases that bear the name of a recipe of ``configs/`` have its stage list and its settings, with two epochs a stage (and
another rate of LearnedRounding), and groups of 32 in the place of 128 and of 16 in that of 64: the models are small.

All paths are relative to the folder in which the runs are made, so that it can be moved and copied.
"""

import random
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import yaml
from tokenizers import Tokenizer, decoders, pre_tokenizers
from tokenizers.models import BPE
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerFast
from transformers.utils import logging as transformers_logging

Settings = dict[str, Any]


@dataclass(frozen=True)
class Case:
    """One run.

    Args:
        scheme: name of the scheme, or the whole section.
        stages: entries of the section.
        model: the tiny model to quantize, of ``MODELS``.
        more: further sections.
        processes: how many ``torchrun`` starts.
    """

    scheme: str | Settings
    stages: list[Settings]
    model: str = "llama"
    more: Settings = field(default_factory=dict)
    processes: int = 1

    def configuration(self, out: str) -> Settings:
        """The whole content of the YAML file."""
        scheme = {"name": self.scheme} if isinstance(self.scheme, str) else self.scheme
        return (
            BASE
            | {"model": {"path": f"sources/{self.model}"}, "scheme": scheme, "stages": self.stages, "out": out}
            | self.more
        )


def stage(name: str, **settings: Any) -> Settings:
    """An entry of ``stages``."""
    return {"class_path": f"omniq.stages.{name}", "init_args": settings}


def omniquant(**settings: Any) -> Settings:
    """Two epochs of OmniQuant."""
    return stage("OmniQuant", **({"epochs": 2} | settings))


def rounding(**settings: Any) -> Settings:
    """Two epochs of LearnedRounding, at a rate at which codes move in as few steps (usual: 4e-3 and a thousand)."""
    return stage("LearnedRounding", **({"epochs": 2, "rounding_lr": 0.05} | settings))


def end_to_end(**settings: Any) -> Settings:
    """Three passes of EndToEnd, at a rate at which few steps show."""
    return stage("EndToEnd", **({"epochs": 3, "lr": 0.01, "patience": 3} | settings))


TEXT = {"class_path": "omniq.data.LocalText", "init_args": {"path": "text.txt"}}
DATA: Settings = {"source": TEXT, "samples": 4, "length": 24, "held_out": 2}
BASE: Settings = {
    "data": DATA,
    "evaluation": {"source": TEXT, "length": 24, "max_windows": 4},
    "trainer": {"accelerator": "cpu"},
}
STDLIB: Settings = {
    "data": DATA | {"source": {"class_path": "omniq.data.Stdlib", "init_args": {"split": "calibration"}}},
    "evaluation": {
        "source": {"class_path": "omniq.data.Stdlib", "init_args": {"split": "held-out"}},
        "length": 24,
        "max_windows": 4,
    },
}
OWN: Settings = {"export": {"format": "omniq"}}  # the other format
SEARCHED: Settings = {"class_path": "omniq.quantizers.clipping.Searched"}
LWC: Settings = {"class_path": "omniq.quantizers.clipping.LWC", "init_args": {"initial": SEARCHED}}
LET: Settings = {"alpha": 0.5}
QUANTEASE = stage("QuantEase")
SYMMETRIC: Settings = {"activation_symmetric": True}
FIXED: Settings = {"activation_range": "tensor"}
EVERYTHING: Settings = {"name": "W4A4KV4", "queries": True}
PAPER = omniquant(augmented_loss=True, transform=LET)

RECIPES: dict[str, Case] = {
    "demo": Case(
        "W3A16g16",
        [omniquant(clipping_lr=0.02, token_weights="relative", clipping={"initial": SEARCHED})],
        more=STDLIB | {"matmul": "bf16", "export": {"prompt": "The capital of France is"}},
    ),
    "omniquant-quantease-w3a16g128": Case("W3A16g32", [omniquant(clipping=LWC), QUANTEASE]),
    "omniquant-rounding-w4a4": Case(
        "W4A4",
        [
            omniquant(token_weights="relative", augmented_loss=True, transform=LET, clipping=LWC),
            rounding(token_weights="relative"),
        ],
    ),
    "quantease-rounding-w3a16g128": Case("W3A16g32", [QUANTEASE, rounding(token_weights="relative")]),
    "quantease-w3a16": Case("W3A16", [QUANTEASE]),
    "spqr-w3a16g16": Case("W3A16g16", [stage("SpQR", threshold=0.5)], more=OWN),
    "w2a16g128": Case("W2A16g32", [omniquant(augmented_loss=True)]),
    "w2a16g64": Case("W2A16g16", [omniquant(augmented_loss=True)]),
    "w3a16": Case("W3A16", [omniquant()]),
    "w3a16g128": Case("W3A16g32", [omniquant()]),
    "w4a16": Case("W4A16", [omniquant()]),
    "w4a16g128": Case("W4A16g32", [omniquant()]),
    "w4a4": Case("W4A4", [PAPER]),
    "w4a8": Case({"name": "W4A8g32"} | SYMMETRIC, [omniquant(transform={"alpha": 0.75, "lr": 1e-3})]),
    "w6a6": Case("W6A6", [omniquant(transform=LET)]),
    "w8a8": Case({"name": "W8A8", "symmetric": True} | SYMMETRIC, [omniquant(transform=LET)]),
}
OTHERS: dict[str, Case] = {
    "compile": Case("W4A4", [PAPER], more={"compile": True, "matmul": "ieee"}),  # takes longest
    # what the recipes' comments say, and the other stages
    "w4a4-paper-kv4-own-format": Case(EVERYTHING, [PAPER], more=OWN),
    "w6a6-paper-kv6-own-format": Case({"name": "W6A6KV6", "queries": True}, [omniquant(transform=LET)], more=OWN),
    "omniquant-rounding-kv4-own-format": Case(EVERYTHING, [PAPER, rounding(norm_lr=1e-3)], more=OWN),
    "w8a8-smoothquant": Case({"name": "W8A8", "symmetric": True} | SYMMETRIC, [stage("SmoothQuant")]),
    "quantease-outliers-own-format": Case("W3A16", [stage("QuantEase", outliers=1)], more=OWN),
    "quantease-algorithm3-own-format": Case(
        "W3A16g16", [stage("QuantEase", outliers=2, outlier_method="algorithm3")], more=OWN
    ),
    "gptq-quantease": Case("W3A16g16", [stage("GPTQ"), stage("QuantEase", start="previous", refit_scales=True)]),
    "gptq-act-order": Case("W4A16g16", [stage("GPTQ", act_order=True, token_weights="relative")]),
    "awq": Case("W3A16g16", [stage("AWQ")]),
    "awq-gptq": Case("W3A16g16", [stage("AWQ"), stage("GPTQ")]),
    "rtn-searched": Case("W4A16g16", [stage("RTN", clipping=SEARCHED)]),
    "outlier-suppression": Case("W4A4", [stage("OutlierSuppression")]),
    "quantease-end-to-end": Case("W3A16g16", [QUANTEASE, end_to_end(memory="model")]),
    "omniquant-end-to-end-streamed-kv4-own-format": Case(
        EVERYTHING, [omniquant(transform=LET), end_to_end(memory="block", codes=True)], more=OWN
    ),
    "pact": Case("W3A16g16", [omniquant(clipping={"class_path": "omniq.quantizers.absolute.PACT"})]),
    "lsq": Case("W3A16g16", [omniquant(clipping={"class_path": "omniq.quantizers.absolute.LSQ"})]),
    "omniquant-twice-shuffled": Case(
        "W3A16g16",
        [omniquant(transform={"shift": False}), omniquant(schedule="cosine", shuffle=True, augmented_loss=True)],
    ),
    # schemes
    "own-format-w3a16g16": Case("W3A16g16", [omniquant()], more=OWN),
    "kv4-alone-own-format": Case("W4A16KV4", [omniquant(transform=LET)], more=OWN),
    "fixed-ranges-w8a8": Case({"name": "W8A8"} | FIXED | SYMMETRIC, [omniquant(transform=LET)]),
    "fixed-ranges-w4a8g16": Case({"name": "W4A8g16"} | FIXED, [QUANTEASE, rounding()]),
    "bfloat16-w4a4": Case({"name": "W4A4", "dtype": "bfloat16"}, [omniquant(transform=LET, batch_size=2)]),
    # models
    "opt-w4a16g16": Case("W4A16g16", [omniquant(transform=LET)], "opt"),
    "opt-fixed-ranges-w8a8": Case({"name": "W8A8"} | FIXED, [stage("SmoothQuant")], "opt"),
    "opt-kv4-own-format": Case(EVERYTHING, [PAPER], "opt", OWN),
    "qwen3-w4a4": Case("W4A4", [PAPER, rounding()], "qwen3"),
    "qwen3-kv4-own-format": Case(EVERYTHING, [PAPER], "qwen3", OWN),
    "qwen2-quantease": Case("W3A16g16", [QUANTEASE], "qwen2"),
    "mistral-shards": Case("W4A16g16", [omniquant()], "mistral", {"export": {"max_shard_size": 5e-5}}),
    # sections of a run
    "blocks-1-w4a4": Case("W4A4", [omniquant(transform=LET)], "llama-3", {"blocks": 1}),
    "blocks-2-own-format": Case("W3A16g16", [QUANTEASE], "llama-3", OWN | {"blocks": 2}),
    "bf16-mixed": Case("W3A16g16", [omniquant()], more={"trainer": {"accelerator": "cpu", "precision": "bf16-mixed"}}),
    "streams-on-disk": Case("W3A16g16", [omniquant()], more={"streams": "disk", "save_streams_every": 2, "batch": 1}),
    "two-processes-w4a4": Case("W4A4", [omniquant(transform=LET, clipping=LWC), rounding()], processes=2),
    "two-processes-quantease-kv4": Case("W3A16KV4", [QUANTEASE], more=OWN, processes=2),
    "two-processes-fixed-ranges": Case({"name": "W8A8"} | FIXED, [stage("AWQ"), stage("GPTQ")], processes=2),
}
CASES = RECIPES | OTHERS

# Case and file: the run is killed as soon as the file has its name.
KILLS: list[tuple[str, str]] = [
    ("omniquant-rounding-w4a4", "current/000.0.last.ckpt"),
    ("omniquant-rounding-w4a4", "current/001.1.last.ckpt"),
    ("quantease-rounding-w3a16g128", "current/000.0.result.safetensors"),
    ("w2a16g64", "blocks/000.safetensors"),
    ("w4a4", "current/001.0.last.ckpt"),
    ("spqr-w3a16g16", "streams.safetensors"),
    ("w8a8", "perplexity.json"),
    ("w4a4-paper-kv4-own-format", "export.json"),
    ("omniquant-twice-shuffled", "current/001.0.block"),
    ("fixed-ranges-w8a8", "blocks/000.safetensors"),
    ("quantease-end-to-end", "current/model.1.last.ckpt"),
    ("quantease-end-to-end", "blocks/000.1.safetensors"),
    ("omniquant-end-to-end-streamed-kv4-own-format", "current/model.1.last.ckpt"),
    ("opt-w4a16g16", "current/000.0.last.ckpt"),
    ("qwen3-kv4-own-format", "current/001.0.last.ckpt"),
    ("blocks-1-w4a4", "blocks/001.safetensors"),
    ("two-processes-w4a4", "current/001.0.last.ckpt"),
    ("two-processes-quantease-kv4", "current/000.0.last.ckpt"),
]

_SIZES: Settings = {
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "vocab_size": 272,  # 256 bytes, <s>, </s>, and a few never used
    "max_position_embeddings": 128,
    "tie_word_embeddings": False,
    "bos_token_id": 256,
    "eos_token_id": 257,
    "pad_token_id": None,
}
_ROTARY: Settings = {"intermediate_size": 96, "num_key_value_heads": 2}
_OPT: Settings = {"ffn_dim": 96, "word_embed_proj_dim": 64, "pad_token_id": 1, "dropout": 0.0}
MODELS: dict[str, tuple[str, Settings]] = {  # family, and what differs from the sizes
    "llama": ("llama", _ROTARY),
    "llama-3": ("llama", _ROTARY | {"num_hidden_layers": 3, "tie_word_embeddings": True}),
    "mistral": ("mistral", _ROTARY | {"sliding_window": None, "head_dim": 16}),
    "qwen2": ("qwen2", _ROTARY),
    "qwen3": ("qwen3", _ROTARY | {"head_dim": 16}),
    "opt": ("opt", _OPT),
}
_WORDS = ("the", "of", "quantized", "block", "by", "weight", "and", "scale", "is", "a", "code", "grid", "that")


def write_inputs(folder: Path) -> None:
    """Put models, text and one YAML file a case into a folder; the same ones on every call."""
    transformers_logging.disable_progress_bar()
    for name in MODELS:
        _model(name).save_pretrained(folder / "sources" / name, max_shard_size="100KB" if name == "mistral" else "1GB")
        _tokenizer().save_pretrained(folder / "sources" / name)
    (folder / "text.txt").write_text(" ".join(random.Random(0).choices(_WORDS, k=2000)))
    (folder / "configs").mkdir()
    for name, case in CASES.items():
        content = case.configuration(f"finished/{name}")
        (folder / "configs" / f"{name}.yaml").write_text(yaml.dump(content, Dumper=_Plain, sort_keys=False))


class _Plain(yaml.SafeDumper):
    """YAML without references between the entries that are one object here."""

    def ignore_aliases(self, data: Any) -> bool:
        return True


def _model(name: str) -> PreTrainedModel:
    """A random model in float32: linears keep the variance of inputs, norms and biases differ from one and zero."""
    family, sizes = MODELS[name]
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(family, **(_SIZES | sizes))).eval()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            if parameter.dim() == 2:
                parameter.copy_(noise if "embed" in key else noise / parameter.shape[1] ** 0.5)
            else:
                parameter.copy_(0.1 * noise + ("norm" in key and key.endswith("weight")))
    return model


def _tokenizer() -> PreTrainedTokenizerFast:
    """Bytes as tokens; nothing is added to a text."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(BPE(vocab={letter: index for index, letter in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>")
