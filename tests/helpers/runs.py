# SPDX-License-Identifier: Apache-2.0
"""Shared by the tests of whole runs: a tiny model, a text and a configuration on disk, and a run's outcome."""

import csv
import hashlib
import json
import random
from pathlib import Path
from typing import Any

import torch
import yaml

from omniq.storage.block_result import BlockResult
from omniq.storage.sealed import load_tensors
from tests.helpers.tiny import save_tiny

WORDS = (
    "the",
    "of",
    "quantized",
    "block",
    "by",
    "weight",
    "and",
    "scale",
    "is",
    "a",
    "code",
    "grid",
    "that",
    "learned",
)
QUICK: dict[str, Any] = {
    "export": {"format": "none"},
    "evaluation": None,
}  # sections of a run that ends with its blocks
SMALL = {"hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 2, "num_key_value_heads": 1}


def write_text(path: Path, words: int = 2000, seed: int = 0) -> Path:
    """A few thousand characters that are always the same."""
    path.write_text(" ".join(random.Random(seed).choices(WORDS, k=words)))
    return path


def omniquant(**settings: Any) -> dict[str, Any]:
    """An entry of ``stages``."""
    return {"class_path": "omniq.stages.OmniQuant", "init_args": {"epochs": 2, **settings}}


def configuration(folder: Path, **sections: Any) -> dict[str, Any]:
    """A run that takes a second: three windows of 24 tokens, two epochs; ``sections`` replace those given here."""
    text = {"class_path": "omniq.data.LocalText", "init_args": {"path": str(folder / "text.txt")}}
    return {
        "model": {"path": str(folder / "source")},
        "data": {"source": text, "samples": 3, "length": 24, "held_out": 1},
        "evaluation": {"source": text, "length": 24, "max_windows": 4},
        "scheme": {"name": "W3A16g16"},
        "stages": [omniquant()],
        "trainer": {"accelerator": "cpu"},
        "out": str(folder / "run"),
        **sections,
    }


def write_run(folder: Path, family: str = "llama", model: dict[str, Any] | None = None, **sections: Any) -> list[str]:
    """Put model, text and ``run.yaml`` into a folder, and return the command line that runs them."""
    save_tiny(folder / "source", family, **(model or {}))
    write_text(folder / "text.txt")
    return write_config(folder / "run.yaml", configuration(folder, **sections))


def write_config(path: Path, content: dict[str, Any]) -> list[str]:
    """Write one configuration file, and return the command line that runs it."""
    path.write_text(yaml.safe_dump(content))
    return ["quantize", "--config", str(path)]


def losses(path: Path, name: str = "loss") -> list[float]:
    """The values of that name, such as the loss of every step, from the CSV file of a fit."""
    with path.open() as file:
        return [float(row["value"]) for row in csv.DictReader(file) if row["name"] == name]


def outcome(run: Path) -> dict[str, Any]:
    """Everything a finished run says, less times: digests of tensors, summaries, losses, the exported folder."""
    found: dict[str, Any] = {}
    for path in sorted((run / "blocks").iterdir()):
        if path.suffix != ".safetensors":
            found[path.name] = path.read_text(errors="replace")
            continue
        if path.stem.count("."):  # what a stage of the whole model changed
            found[path.name] = {name: _digest(value) for name, value in load_tensors(path)[0].items()}
            continue
        result = BlockResult.load(path)
        tensors = {name: vars(linear) for name, linear in result.linears.items()} | dict(result.tensors)
        found[path.name] = {name: _digest(value) for name, value in tensors.items()}
        found[f"{path.name} summary"] = json.dumps({**result.summary, "seconds": 0})
    if (run / "model_stages.json").exists():
        record = json.loads((run / "model_stages.json").read_text())
        found["model_stages"] = {key: {**record[key], "seconds": 0} for key in record if key != "sha256"}
    for path in sorted((run / "model").iterdir()) if (run / "model").exists() else ():
        if path.name not in ("README.md", "recipe.yaml"):  # the card tells seconds, the recipe says where it ran
            found[f"model/{path.name}"] = hashlib.sha256(path.read_bytes()).hexdigest()
    if (run / "perplexity.json").exists():
        results = json.loads((run / "perplexity.json").read_text())["models"]
        found["perplexity"] = {name: {**entry, "seconds": 0} for name, entry in results.items()}
    return found


def _digest(value: Any) -> str:
    if isinstance(value, torch.Tensor):
        head = f"{value.dtype} {list(value.shape)}".encode()
        return hashlib.sha256(head + value.contiguous().flatten().view(torch.uint8).numpy().tobytes()).hexdigest()
    return str({name: _digest(part) for name, part in value.items()}) if isinstance(value, dict) else repr(value)
