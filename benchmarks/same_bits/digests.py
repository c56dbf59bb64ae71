# SPDX-License-Identifier: Apache-2.0
"""Digests of what a run leaves, item by item: a SHA-256 of every tensor, summary, file of losses and perplexity.

Content counts, not files: times and versions are left out, and so are the recipe and the card, which tell them. The
files are read as what they are (safetensors, JSON, CSV), without omniq, whose own readers are what may change.
"""

import csv
import hashlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

Digests = dict[str, str]  # by item, such as ``blocks/000.0.csv``


def of_run(run: Path) -> Digests:
    """Everything that must stay as it is.

    Args:
        run: the directory of a finished run.
    """
    found: Digests = {}
    for path in sorted((run / "blocks").glob("*.safetensors")):
        about, tensors = read_safetensors(path)
        name = f"blocks/{path.name}"
        if "summary" in about:  # a finished block, not what a stage of the whole model changed in it
            summary = {key: value for key, value in json.loads(about["summary"]).items() if key != "seconds"}
            found |= {f"{name} grids": of(json.loads(about["grids"])), f"{name} summary": of(summary)}
        found |= {f"{name} {tensor}": digest for tensor, digest in tensors}
    for path in sorted((run / "blocks").glob("*.csv")):
        with path.open(newline="") as file:
            found[f"blocks/{path.name}"] = of(list(csv.reader(file)))
    for path in sorted((run / "model").glob("*.safetensors")):
        about, tensors = read_safetensors(path)
        found[f"model/{path.name} metadata"] = of(about)
        found |= {f"model/{path.name} {tensor}": digest for tensor, digest in tensors}
    for path in sorted((run / "model").glob("*.json")):
        found[f"model/{path.name}"] = of(_without_versions(json.loads(path.read_bytes())))
    measured = json.loads((run / "perplexity.json").read_bytes())
    found["perplexity.json tokens"] = of(measured["tokens"])
    for model, entry in measured["models"].items():
        found[f"perplexity.json {model}"] = of({key: value for key, value in entry.items() if key != "seconds"})
    return found


def of(content: Any) -> str:
    """The digest of what JSON can hold, whatever the order of its keys."""
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def of_files(folder: Path, pattern: str) -> Digests:
    """The digest of whole files, by name."""
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in sorted(folder.glob(pattern))}


def read_safetensors(path: Path) -> tuple[dict[str, str], Iterator[tuple[str, str]]]:
    """The metadata of a file, and the digest of each tensor by name: of its dtype, shape and bytes."""
    data = path.read_bytes()
    begin = 8 + int.from_bytes(data[:8], "little")
    entries = json.loads(data[8:begin])
    about = entries.pop("__metadata__", {})

    def digests() -> Iterator[tuple[str, str]]:
        for name, entry in sorted(entries.items()):
            first, last = entry["data_offsets"]
            digest = hashlib.sha256(f"{entry['dtype']} {entry['shape']} ".encode())
            digest.update(data[begin + first : begin + last])
            yield name, digest.hexdigest()

    return about, digests()


def _without_versions(content: Any) -> Any:
    """A configuration without the versions of packages; the version of omniq's own format stays."""
    if not isinstance(content, dict):
        return content
    content = {key: value for key, value in content.items() if key != "transformers_version"}
    quantized = content.get("quantization_config", {})
    if quantized.get("quant_method") == "compressed-tensors":
        content["quantization_config"] = {key: value for key, value in quantized.items() if key != "version"}
    return content
