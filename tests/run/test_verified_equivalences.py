# SPDX-License-Identifier: Apache-2.0
"""Equivalences in whole runs: a wrong one is refused before calibration; Phi-3 and Gemma run to a verified export."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from omniq.cli.command import main
from omniq.models import families
from omniq.models.families.gemma import GEMMA
from omniq.models.families.llama import LLAMA
from omniq.models.family import Family
from omniq.transforms.equivalences import QueryKey
from tests.helpers.runs import QUICK, SMALL, omniquant, write_run
from tests.helpers.tiny import HALF_TURNED

SIZES: dict[str, dict[str, Any]] = {"phi3": SMALL, "gemma": SMALL | {"head_dim": 16}}
W4A4KV4 = {"name": "W4A4KV4", "queries": True}
EVERY: dict[str, Any] = {"equivalences": ["norm", "value_output", "query_key", "up_down"]}


def declare(patch: pytest.MonkeyPatch, family: Family) -> None:
    others = [each for each in families.FAMILIES if not set(each.model_types) & set(family.model_types)]
    patch.setattr(families, "FAMILIES", (*others, family))


def test_run_of_gemma_declared_with_plain_norm_is_refused_by_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    declare(monkeypatch, replace(LLAMA, model_types=("gemma",), new_biases=False))
    stages = [omniquant(transform={})]
    assert main(write_run(tmp_path, "gemma", SIZES["gemma"], stages=stages, **QUICK)) == 2
    told = " ".join(capsys.readouterr().err.split())
    assert "model.layers.0: the equivalence norm of input_layernorm, self_attn.q_proj, self_attn.k_proj" in told
    assert "and 1e-05 is allowed: remove 'norm' from the equivalences of the stage" in told
    assert "correct its declaration in the family of gemma" in told
    assert not (tmp_path / "run" / "blocks").exists()
    declare(monkeypatch, GEMMA)
    assert main(write_run(tmp_path, "gemma", SIZES["gemma"], stages=stages, **QUICK)) == 0


def test_run_does_not_verify_unused_equivalences(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """These are kinds that are not selected, and query_key while queries and keys stay at 16 bits."""
    untied = tuple(replace(each, rotary=None) if isinstance(each, QueryKey) else each for each in LLAMA.equivalences)
    declare(monkeypatch, replace(LLAMA, equivalences=untied))
    rows: list[tuple[dict[str, Any], dict[str, Any], int]] = [
        ({}, {"name": "W4A16"}, 0),
        ({"equivalences": ["norm"]}, W4A4KV4, 0),
        ({}, W4A4KV4, 2),
    ]
    for number, (transform, scheme, status) in enumerate(rows):
        folder = tmp_path / str(number)
        folder.mkdir()
        stages = [omniquant(epochs=1, transform=transform)]
        assert main(write_run(folder, "llama", SMALL, stages=stages, scheme=scheme, **QUICK)) == status


def test_run_of_llama_with_partial_rotary_factor_succeeds(tmp_path: Path) -> None:
    """LLaMA in transformers ignores this key and turns whole heads, so the scale ties all pairs."""
    stages = [omniquant(epochs=1, transform={"equivalences": ["query_key"]})]
    args = write_run(tmp_path, "llama", SMALL | HALF_TURNED, stages=stages, scheme=W4A4KV4, **QUICK)
    assert main(args) == 0


@pytest.mark.parametrize("family", list(SIZES))
@pytest.mark.parametrize(
    ("stages", "scheme", "export"),
    [
        ([omniquant(epochs=2, transform=EVERY)], {"name": "W4A16g16"}, "compressed-tensors"),
        ([omniquant(epochs=2, transform=EVERY)], W4A4KV4, "omniq"),
        ([{"class_path": "omniq.stages.QuantEase"}], {"name": "W4A16g16"}, "compressed-tensors"),
        ([{"class_path": "omniq.stages.AWQ"}, {"class_path": "omniq.stages.GPTQ"}], {"name": "W4A16"}, "omniq"),
    ],
)
def test_run_of_each_family_ends_with_verified_export(
    family: str,
    stages: list[dict[str, Any]],
    scheme: dict[str, Any],
    export: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    asked = {"scheme": scheme, "export": {"format": export}, "stages": stages}
    assert main(write_run(tmp_path, family, SIZES[family], **asked)) == 0
    assert "read back equal; logits through transformers within" in " ".join(capsys.readouterr().out.split())
    results = json.loads((tmp_path / "run" / "perplexity.json").read_text())["models"]
    assert results["omniq"]["nll"] < 1.1 * results["full precision"]["nll"]
