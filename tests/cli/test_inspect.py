# SPDX-License-Identifier: Apache-2.0
"""``omniq inspect`` describes declared and discovered models as tables and as JSON, and writes no file."""

import json
from pathlib import Path
from typing import Any

import pytest

from omniq.cli.command import main
from tests.helpers.zoo import zoo_model


def inspected(folder: Path, name: str, capsys: pytest.CaptureFixture[str]) -> dict[str, Any]:
    zoo_model(name).save_pretrained(folder)
    before = sorted(folder.rglob("*"))
    capsys.readouterr()
    assert main(["inspect", "--model.path", str(folder), "--json"]) == 0
    assert sorted(folder.rglob("*")) == before
    found: dict[str, Any] = json.loads(capsys.readouterr().out)
    return found


def test_inspect_json_of_discovered_hybrid(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    found = inspected(tmp_path, "bamba", capsys)
    assert (found["type"], found["family"], found["blocks"]) == ("bamba", "discovered", 2)
    mamba, attention = found["kinds"]
    assert (mamba["blocks"], attention["blocks"]) == ([0], [1])
    assert mamba["linears"][0] == {"mamba.in_proj": [296, 64]}
    assert mamba["kept"] == {"mamba.conv1d.weight": "a parameter of Conv1d, not a linear layer"}
    assert (mamba["attention"], attention["attention"]) == (None, "self_attn")
    errors = attention["equivalences"]
    assert "value_output of self_attn.v_proj, self_attn.o_proj" in errors
    assert all(0 < error < 1e-13 for error in errors.values())  # measured: 7e-16
    assert all(error > 1e-3 for error in attention["rejected"].values())
    assert found["group sizes"] == [16, 32, 64]
    assert found["formats"]["compressed-tensors"]["W4A16"] is None
    assert "does not call transformers' attention interface" in found["formats"]["omniq"]["W4A4KV4"]
    assert 0 < found["quantized weights"] < found["parameters of blocks"] < found["parameters"]


def test_inspect_json_of_declared_family(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    found = inspected(tmp_path, "llama", capsys)
    assert found["family"] == "declared"
    (kind,) = found["kinds"]
    assert kind["blocks"] == [0, 1]
    assert len(kind["equivalences"]) == 5
    assert not kind["rejected"]
    assert found["formats"]["omniq"]["W4A4KV4"] is None


def test_inspect_table_names_blocks_linears_and_formats(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    zoo_model("nemotron_h").save_pretrained(tmp_path)
    assert main(["inspect", "--model.path", str(tmp_path)]) == 0
    text = " ".join(capsys.readouterr().out.split())
    for words in ("nemotron_h (discovered family)", "blocks 2", "mixer.in_proj", "compressed-tensors", "16, 32, 64"):
        assert words in text


def test_inspect_model_that_cannot_be_quantized_says_why(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    zoo_model("gpt2").save_pretrained(tmp_path)
    assert main(["inspect", "--model.path", str(tmp_path)]) == 2
    assert "its blocks compute with Conv1D" in capsys.readouterr().err
