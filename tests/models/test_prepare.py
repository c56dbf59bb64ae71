# SPDX-License-Identifier: Apache-2.0
"""Prepared checkpoints: folded norms keep logits and block outputs, and the digest stays."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import GemmaConfig, GemmaForCausalLM, PreTrainedModel
from transformers.models.gemma.modeling_gemma import GemmaRMSNorm

from omniq.errors import UserError
from omniq.models.checkpoint import SafetensorsCheckpoint
from omniq.models.meta import meta_model
from omniq.models.prepare import FoldedNorms, NormFold, Renamed
from omniq.models.source import SourceModel
from omniq.models.weight_files import SINGLE
from tests.helpers.opening import stream, tokens
from tests.helpers.tiny import save_tiny, tiny_model

TOLERANCE = {torch.float64: 1e-12, torch.float32: 1e-5}  # relative; measured block by block: 6e-16 and 4e-7
QKV = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")
ROTARY = {"input_layernorm": QKV, "post_attention_layernorm": ("mlp.gate_proj", "mlp.up_proj")}
READERS: dict[str, tuple[str, str, dict[str, tuple[str, ...]]]] = {  # blocks, final norm, readers of each norm
    "llama": ("model.layers", "model.norm", ROTARY),
    "gemma": ("model.layers", "model.norm", ROTARY),
    "opt": (
        "model.decoder.layers",
        "model.decoder.final_layer_norm",
        {"self_attn_layer_norm": QKV, "final_layer_norm": ("fc1",)},
    ),
}


def folds(family: str) -> list[NormFold]:
    """Every norm of a tiny model of two blocks, with its readers; the head of OPT has no bias for the last shift."""
    blocks, last, readers = READERS[family]
    offset = int(family == "gemma")
    found = [
        NormFold(f"{blocks}.{index}.{norm}", tuple(f"{blocks}.{index}.{name}" for name in names), offset)
        for index in range(2)
        for norm, names in readers.items()
    ]
    return found if family == "opt" else [*found, NormFold(last, ("lm_head",), offset)]


def tiny(family: str) -> PreTrainedModel:
    """A tiny model; norms of Gemma multiply by 1 + w, so its weights are near 0."""
    if family != "gemma":
        return tiny_model(family)
    sizes: dict[str, Any] = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "head_dim": 16}
    config = GemmaConfig(
        **sizes, num_attention_heads=4, num_key_value_heads=2, vocab_size=272, tie_word_embeddings=False
    )
    model = GemmaForCausalLM(config).eval()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            parameter.copy_(noise / parameter.shape[-1] ** 0.5 if parameter.dim() == 2 else 0.3 * noise)
    return model


def stored(folder: Path, model: PreTrainedModel) -> SafetensorsCheckpoint:
    model.save_pretrained(folder)
    return SafetensorsCheckpoint(folder, SINGLE)


def moved(after: Tensor, before: Tensor) -> float:
    return ((after - before).abs().max() / before.abs().max()).item()


@torch.no_grad()
@pytest.mark.parametrize("dtype", list(TOLERANCE))
@pytest.mark.parametrize("family", ["llama", "opt", "gemma"])
def test_folded_norms_keep_logits_of_whole_model(
    tmp_path: Path, family: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    # The code of Gemma scales in float32 whatever the dtype, which would hide a difference in float64.
    monkeypatch.setattr(GemmaRMSNorm, "forward", lambda self, x: self._norm(x) * (1 + self.weight))
    model = tiny(family).to(dtype)
    checkpoint = stored(tmp_path, model)
    before = model(tokens()).logits
    prepared = FoldedNorms(checkpoint, folds(family))
    changed = prepared.read(prepared.tensors)
    assert {name: value.dtype for name, value in changed.items()} == dict.fromkeys(checkpoint.tensors, dtype)
    model.load_state_dict(changed, strict=False)
    norms = [fold.norm for fold in folds(family)]
    assert all((model.get_parameter(f"{norm}.weight") == 1 - int(family == "gemma")).all() for norm in norms)
    assert moved(model(tokens()).logits, before) < TOLERANCE[dtype]


@torch.no_grad()
@pytest.mark.parametrize("dtype", list(TOLERANCE))
@pytest.mark.parametrize("family", ["llama", "opt"])
def test_folded_norms_keep_output_of_each_block(tmp_path: Path, family: str, dtype: torch.dtype) -> None:
    checkpoint = stored(tmp_path, tiny(family).to(dtype))
    config = SourceModel.open(tmp_path).config
    plain, folded = (
        SourceModel.of(meta_model(config, dtype, "sdpa"), each, tmp_path)
        for each in (checkpoint, FoldedNorms(checkpoint, folds(family)))
    )
    hidden, kwargs = plain.embed(tokens())
    same, _ = folded.embed(tokens())
    for index in range(plain.num_blocks):
        hidden = plain.block(index)(hidden, **kwargs[index])
        same = folded.block(index)(same, **kwargs[index])
        assert moved(same, hidden) < TOLERANCE[dtype]
    assert moved(folded.logits(same), plain.logits(hidden)) < TOLERANCE[dtype]


def test_folded_norms_of_bfloat16_weights_round_once(tmp_path: Path) -> None:
    checkpoint = stored(tmp_path, tiny("llama").to(torch.bfloat16))
    name, norm = "model.layers.1.mlp.up_proj.weight", "model.layers.1.post_attention_layernorm.weight"
    exact = checkpoint.read([name])[name].double() * checkpoint.read([norm])[norm].double()
    assert torch.equal(FoldedNorms(checkpoint, folds("llama")).read([name])[name], exact.bfloat16())


def test_folded_norms_of_tied_head_are_refused(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    source = SourceModel.open(save_tiny(tmp_path, tie_word_embeddings=True), dtype="float32")
    checkpoint = SafetensorsCheckpoint(tmp_path, SINGLE)
    with pytest.raises(UserError, match=r"lm_head.weight is not stored, so model.norm cannot be folded into lm_head"):
        FoldedNorms(checkpoint, folds("llama"))
    names = {name: name for name in checkpoint.tensors} | {"lm_head.weight": "model.embed_tokens.weight"}
    untied = FoldedNorms(Renamed(checkpoint, names), folds("llama"))
    folded = SourceModel.of(meta_model(source.config, torch.float32, "sdpa"), untied, tmp_path)
    assert "lm_head.weight differs from model.embed_tokens.weight, so they are not tied" in caplog.text
    assert moved(stream(folded, tokens()), stream(source, tokens())) < TOLERANCE[torch.float32]
    assert "lm_head.weight" in dict(folded.outside())


def test_folded_norms_without_bias_or_twice_are_refused(tmp_path: Path) -> None:
    checkpoint = stored(tmp_path, tiny("opt"))
    last = NormFold("model.decoder.final_layer_norm", ("lm_head",))
    without_bias = Renamed(checkpoint, {name: name for name in checkpoint.tensors if "fc1.bias" not in name})
    with pytest.raises(UserError, match=r"layers\.0\.fc1 has no bias to take over that of .*final_layer_norm"):
        FoldedNorms(without_bias, folds("opt"))
    twice = NormFold("model.decoder.layers.0.final_layer_norm", ("model.decoder.layers.0.fc1",))
    with pytest.raises(UserError, match=r"layers\.0\.fc1 follows two norms"):
        FoldedNorms(checkpoint, [*folds("opt"), twice])
    with pytest.raises(UserError, match=r"lm_head has no bias"):
        FoldedNorms(checkpoint, [last])


def test_prepared_checkpoint_keeps_digest_of_files(tmp_path: Path) -> None:
    checkpoint = stored(tmp_path, tiny("llama"))
    renamed = Renamed(checkpoint, {f"inner.{name}": name for name in checkpoint.tensors})
    folded = FoldedNorms(checkpoint, folds("llama"))
    assert checkpoint.digest() == renamed.digest() == folded.digest()
    assert checkpoint.files == renamed.files == folded.files
