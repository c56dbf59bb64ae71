# SPDX-License-Identifier: Apache-2.0
"""Whole runs of tiny models of the declared families: round to nearest, OmniQuant with LET, QuantEase.

Each run ends with an export that transformers opens, and whose logits equal those of the finished blocks.
"""

import json
from pathlib import Path
from typing import Any

import pytest

from omniq.cli.command import main
from tests.helpers.float64_block import FALCON_RW, NEW_DECODER
from tests.helpers.runs import QUICK, omniquant, write_run

STAGES: dict[str, Any] = {
    "RTN": {"class_path": "omniq.stages.RTN"},
    "OmniQuant": omniquant(epochs=1),
    "QuantEase": {"class_path": "omniq.stages.QuantEase", "init_args": {"sweeps": 5}},
}
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "bloom": ("bloom", {"tie_word_embeddings": True}),
    "falcon 7b": ("falcon", {"bias": False}),
    "falcon 40b": ("falcon", {"bias": False, **NEW_DECODER}),
    "falcon rw": ("falcon", FALCON_RW),
    "opt 350m": ("opt", {"do_layer_norm_before": False, "word_embed_proj_dim": 32}),
    "gemma 2": ("gemma2", {}),
    "gemma 3": ("gemma3_text", {}),
    "gpt-neox": ("gpt_neox", {}),
    "granite": ("granite", {}),
    "mixtral": ("mixtral", {}),
    "qwen2-moe": ("qwen2_moe", {}),
    "qwen3-moe": ("qwen3_moe", {}),
    "olmoe": ("olmoe", {}),
    "olmo 3": ("olmo3", {}),
    "smollm3": ("smollm3", {}),
}
GELU, POST_NORM = ("up_down",), ("norm",)  # kinds of equivalences that a family lacks
LACKS = dict.fromkeys(("bloom", "falcon 7b", "falcon 40b", "falcon rw", "gpt-neox"), GELU)
LACKS |= dict.fromkeys(("opt 350m", "olmo 3"), POST_NORM)


@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize("label", MODELS)
def test_run_of_declared_family_ends_with_verified_export(
    label: str, stage: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    family, model = MODELS[label]
    chosen = STAGES[stage]
    if stage == "OmniQuant":
        kinds = [kind for kind in ("norm", "value_output", "up_down") if kind not in LACKS.get(label, ())]
        chosen = omniquant(epochs=1, transform={"equivalences": kinds})
    scheme = {"name": "W4A16g16", "symmetric": "mo" in family or family == "mixtral"}  # experts need it
    assert main(write_run(tmp_path, family, model, scheme=scheme, stages=[chosen])) == 0
    assert "read back equal; logits through transformers within 0.0e+00" in " ".join(capsys.readouterr().out.split())
    results = json.loads((tmp_path / "run" / "perplexity.json").read_text())["models"]
    assert results["omniq"]["nll"] < 1.1 * results["full precision"]["nll"]


@pytest.mark.parametrize("label", ["bloom", "falcon 7b"])
def test_run_with_quantized_keys_is_refused_where_attention_cannot_be_redirected(
    label: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    family, model = MODELS[label]
    assert main(write_run(tmp_path, family, model, scheme={"name": "W4A4KV4"}, stages=[STAGES["RTN"]], **QUICK)) == 2
    told = " ".join(capsys.readouterr().err.split())
    assert f"the attention of {family} does not call transformers' attention interface" in told
    assert "use a scheme without KV bits and with queries false" in told
