# SPDX-License-Identifier: Apache-2.0
"""A run of a model whose tokenizer adds BOS: windows begin with it, and summary and card say so."""

import json
from pathlib import Path

import pytest
import torch
from tokenizers.processors import TemplateProcessing
from torch.nn.functional import cross_entropy
from transformers import AutoModelForCausalLM

from omniq.cli.command import main
from tests.helpers.runs import write_run
from tests.helpers.tiny import tiny_tokenizer

STAGES = [{"class_path": "omniq.stages.RTN"}]


@pytest.mark.parametrize(("family", "place", "title"), [("gemma", "window", ", each with BOS"), ("llama", "text", "")])
def test_run_begins_windows_with_bos_and_says_so(family: str, place: str, title: str, tmp_path: Path) -> None:
    args = write_run(tmp_path, family, {}, stages=STAGES, scheme={"name": "W4A16g16"})
    tokenizer = tiny_tokenizer()
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 256)])
    tokenizer.save_pretrained(tmp_path / "source")
    assert main(args) == 0
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert summary["bos"] == {"calibration": place, "evaluation": place}
    (text,) = summary["perplexity"]
    assert text.endswith(f"){title}")
    card = (tmp_path / "run" / "model" / "README.md").read_text()
    assert f"| BOS in calibration | {place} |" in card
    assert f"| BOS in evaluation | {place} |" in card
    tokens = tiny_tokenizer()((tmp_path / "text.txt").read_text(), return_tensors="pt").input_ids[0]
    if place == "window":
        windows = torch.cat([torch.full((4, 1), 256), tokens[: 4 * 23].view(4, 23)], 1)
    else:
        windows = torch.cat([torch.tensor([256]), tokens])[: 4 * 24].view(4, 24)
    with torch.no_grad():
        logits = AutoModelForCausalLM.from_pretrained(tmp_path / "source")(windows).logits
    loss = cross_entropy(logits[:, :-1].flatten(0, 1).double(), windows[:, 1:].flatten())
    measured = json.loads((tmp_path / "run" / "perplexity.json").read_text())["models"]["full precision"]["nll"]
    assert measured == pytest.approx(loss.item(), rel=1e-6)  # measured 1e-8
