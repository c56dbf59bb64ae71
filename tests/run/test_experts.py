# SPDX-License-Identifier: Apache-2.0
"""Whole runs of mixtures of experts: few tokens, quantized inputs, and what a format refuses."""

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch

from omniq.cli.command import main
from omniq.storage.block_result import BlockResult
from tests.helpers.runs import QUICK, configuration, omniquant, write_run

RTN: dict[str, Any] = {"class_path": "omniq.stages.RTN"}
GPTQ: dict[str, Any] = {"class_path": "omniq.stages.GPTQ"}
SYMMETRIC = {"name": "W4A16g16", "symmetric": True}


def blocks_of(run: Path) -> list[BlockResult]:
    return [BlockResult.load(path) for path in sorted((run / "blocks").glob("*.safetensors"))]


def test_expert_with_fewer_tokens_than_inputs_is_rounded_to_nearest(tmp_path: Path) -> None:
    """72 tokens choose two of four experts each, so some experts see fewer tokens than their 64 inputs."""
    minmax = {"clipping": {"class_path": "omniq.quantizers.clipping.MinMax"}}
    results = []
    for number, stage in enumerate((GPTQ, RTN)):
        folder = tmp_path / str(number)
        folder.mkdir()
        stages = [{**stage, "init_args": minmax}]
        assert main(write_run(folder, "mixtral", {}, scheme=SYMMETRIC, stages=stages, **QUICK)) == 0
        results.append(blocks_of(folder / "run")[0])
    solved, rounded = results
    told = re.fullmatch(
        r"fewer calibration tokens than inputs reach (.*): rounded to nearest", solved.summary["too few tokens"]
    )
    assert told
    counts = {name: int(count) for name, count in re.findall(r"(\S+) \((\d+)\)", told[1])}
    assert all(0 < count < 64 for name, count in counts.items() if not name.endswith("w2"))
    gates = {name for name in solved.linears if name.endswith("w1")}
    assert gates & counts.keys()
    for name, linear in solved.linears.items():
        first = name.replace(".w3", ".w1")  # the first linear of its group stands for the group
        assert torch.equal(linear.codes, rounded.linears[name].codes) == (first in counts), name
    assert "too few tokens" not in rounded.summary


def test_expert_with_enough_tokens_is_solved(tmp_path: Path) -> None:
    text = configuration(tmp_path)["data"]["source"]
    data = {"source": text, "samples": 12, "length": 64}
    model = {"num_experts_per_tok": 3, "hidden_size": 32, "intermediate_size": 32, "num_attention_heads": 2}
    args = write_run(tmp_path, "mixtral", model, scheme=SYMMETRIC, stages=[GPTQ], data=data, **QUICK)
    assert main(args) == 0
    for block in blocks_of(tmp_path / "run"):
        assert "too few tokens" not in block.summary
        assert "unreached" not in block.summary


@pytest.mark.parametrize("family", ["mixtral", "qwen2_moe"])
def test_run_with_fixed_ranges_of_inputs_of_experts_ends(tmp_path: Path, family: str) -> None:
    scheme = {"name": "W4A8", "activation_range": "tensor"}
    assert main(write_run(tmp_path, family, {}, scheme=scheme, stages=[omniquant(epochs=1)], **QUICK)) == 0
    block = blocks_of(tmp_path / "run")[0]
    assert all(linear.input is not None for linear in block.linears.values())


@pytest.mark.parametrize("family", ["mixtral", "qwen2_moe", "olmoe"])
def test_run_with_quantized_inputs_of_experts_reopens_in_format_omniq(
    tmp_path: Path, family: str, capsys: pytest.CaptureFixture[str]
) -> None:
    export = {"format": "omniq"}
    assert main(write_run(tmp_path, family, {}, scheme={"name": "W4A4KV4"}, stages=[RTN], export=export)) == 0
    assert "logits through transformers within 0.0e+00" in " ".join(capsys.readouterr().out.split())
    kept = json.loads((tmp_path / "run" / "summary.json").read_text())["kept"]
    assert kept["model.layers.0.mlp.gate"] == "router or gate of experts"


@pytest.mark.parametrize(
    ("scheme", "told"),
    [
        ({"name": "W4A16g16"}, "asymmetric grids in experts of mixtral: set scheme.symmetric to true"),
        ({"name": "W8A8", "symmetric": True}, "quantized inputs in experts of mixtral: use format omniq"),
        (
            SYMMETRIC | {"rules": [{"layers": "re:.*w2", "name": "W8A16g16"}]},
            "2 grids in experts of mixtral: use format",
        ),
        (
            SYMMETRIC | {"rules": [{"layers": "re:.*experts.1.w2", "name": "none"}]},
            "linears in floating point in experts",
        ),
    ],
)
def test_run_whose_experts_transformers_would_misread_is_refused(
    scheme: dict[str, Any], told: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(write_run(tmp_path, "mixtral", {}, scheme=scheme, stages=[RTN])) == 2
    assert f"export.format compressed-tensors does not support {told}" in " ".join(capsys.readouterr().err.split())
    assert not (tmp_path / "run" / "blocks").exists()


def test_run_of_awq_on_experts_ends_with_verified_export(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    stages = [{"class_path": "omniq.stages.AWQ"}]
    assert main(write_run(tmp_path, "qwen3_moe", {}, scheme=SYMMETRIC, stages=stages)) == 0
    assert "logits through transformers within 0.0e+00" in " ".join(capsys.readouterr().out.split())
