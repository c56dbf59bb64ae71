# SPDX-License-Identifier: Apache-2.0
"""The model card: the information that a user needs to load the checkpoint, judge it, and reproduce it.

The card is a pure function of facts: the same facts give the same text, so it contains no date. A section without facts
is omitted.
"""

import re
import shlex
from collections.abc import Mapping, Sequence
from numbers import Real
from typing import Any

import yaml

_TAG = "omniq"
_READER = "transformers>=5.17"  # the oldest version that was tested with our checkpoints
_SHOWN = 16  # largest number of blocks to list; of more blocks, only the first and the last eight are listed


def model_card(facts: Mapping[str, Any]) -> str:
    """Write the card.

    Args:
        facts: any of

            ``name``: name of the checkpoint folder; ``base_model``: Hub name or folder of the source model;
            ``scheme``: name such as ``W3A16g64``; ``method``: short description of the method;
            ``library`` and ``usage``: name of the runtime and how to run the model there; transformers by default;
            ``format`` and ``requires``: the layout, and the packages that a reader needs beside transformers;
            ``bits_per_weight``: bits of codes (at their own width), scales, zero points and outliers; ``bytes``: size
            of all tensors as the format stores them; ``stored_scheme`` and ``stored_bits_per_weight``: scheme and bits
            of a checkpoint whose codes are wider, or whose groups are smaller, than those of ``scheme``;
            ``perplexity``: values by text, then by model; lower is better;
            ``blocks``: the summary of each block, numbers by name (losses, seconds);
            ``recipe``: the configuration as YAML; ``seed``; ``source_digest``: digest of the source model;
            ``data``: origin, digest and sizes of the calibration text; ``bos``: where windows begin with BOS, by
            ``calibration`` and ``evaluation``; ``versions``: versions of the used packages.

    Returns:
        Markdown with a YAML front matter.
    """
    sections = [
        _front_matter(facts),
        _heading(facts),
        _loading(facts),
        _perplexity(facts.get("perplexity", {})),
        _origin(facts),
        _blocks(facts.get("blocks", ())),
        f"## Recipe\n\n```yaml\n{str(facts['recipe']).strip()}\n```" if facts.get("recipe") else "",
    ]
    return "\n\n".join(section for section in sections if section) + "\n"


def is_card(text: str) -> bool:
    """True if ``model_card`` has written this text, judged by the tag in its front matter."""
    head = text.removeprefix("---\n").partition("\n---")[0]
    try:
        found = yaml.safe_load(head) if text.startswith("---\n") else None
    except (yaml.YAMLError, ValueError):  # ValueError: an impossible date
        return False
    tags = found.get("tags") if isinstance(found, dict) else None
    return isinstance(tags, list) and _TAG in tags


def _front_matter(facts: Mapping[str, Any]) -> str:
    head: dict[str, Any] = {"library_name": facts.get("library", "transformers"), "pipeline_tag": "text-generation"}
    tags = [_TAG, "quantized", facts.get("format"), facts.get("scheme")]
    head["tags"] = list(dict.fromkeys(tag for tag in tags if tag))  # the format may also be omniq
    if _is_hub_name(base := str(facts.get("base_model", ""))):
        head |= {"base_model": base, "base_model_relation": "quantized"}
    return f"---\n{yaml.safe_dump(head, sort_keys=False, allow_unicode=True).strip()}\n---"


def _is_hub_name(base: str) -> bool:
    """True for a Hub name ``owner/name``; local paths must not be published."""
    return re.fullmatch(r"\w[\w.-]*/\w[\w.-]*", base) is not None and not base.endswith(".gguf")


def _heading(facts: Mapping[str, Any]) -> str:
    base = str(facts.get("base_model", "")).rstrip("/")
    base = base if _is_hub_name(base) else base.rpartition("/")[2]
    how = [f"in {facts['scheme']}"] if "scheme" in facts else []
    how += [f"with {facts['method']}"] if "method" in facts else []
    text = f"{base or 'A language model'}, quantized by omniq" + (f" {' '.join(how)}" if how else "") + "."
    if "bits_per_weight" in facts:
        text += (
            " The codes of the quantized linears, with their scales, zero points and outliers, take "
            f"{facts['bits_per_weight']:.3f} bits per weight; all other parameters stay in floating point."
        )
    if "stored_scheme" in facts:
        text += (
            f" This checkpoint stores the same weights in {facts['stored_scheme']}, which takes "
            f"{facts['stored_bits_per_weight']:.3f} bits per weight."
        )
    if "bytes" in facts:
        text += f" The tensors take {facts['bytes'] / 1e6:,.1f} MB."
    return f"# {facts.get('name', 'model')}\n\n{text}"


def _loading(facts: Mapping[str, Any]) -> str:
    if "usage" in facts:
        return f"## Use\n\n{facts['usage']}"
    folder = facts.get("name", "path/to/this/folder")
    packages = [_READER, *facts.get("requires", ())]
    reader = "import omniq  # teaches transformers this format\n" if "omniq" in packages else ""
    return (
        f"## Use\n\n`pip install {' '.join(map(shlex.quote, packages))}`, then\n\n```python\n{reader}"
        "from transformers import AutoModelForCausalLM, AutoTokenizer\n"
        f'model = AutoModelForCausalLM.from_pretrained("{folder}")\n'
        f'tokenizer = AutoTokenizer.from_pretrained("{folder}")\n```'
    )


def _perplexity(perplexity: Mapping[str, Mapping[str, float]]) -> str:
    if not perplexity:
        return ""
    models = list(dict.fromkeys(model for row in perplexity.values() for model in row))
    rows = [[text, *(_number(row.get(model)) for model in models)] for text, row in perplexity.items()]
    return f"## Perplexity\n\n{_table(['text', *models], rows)}"


def _origin(facts: Mapping[str, Any]) -> str:
    rows = [["base model digest", facts["source_digest"]]] if "source_digest" in facts else []
    rows += [[f"calibration {key}", value] for key, value in facts.get("data", {}).items()]
    rows += [[f"BOS in {part}", place] for part, place in facts.get("bos", {}).items()]
    rows += [["seed", facts["seed"]]] if "seed" in facts else []
    rows += [[package, version] for package, version in facts.get("versions", {}).items()]
    return f"## Origin\n\n{_table(['', ''], rows)}" if rows else ""


def _blocks(blocks: Sequence[Mapping[str, Any]]) -> str:
    kinds = [{key for key, value in block.items() if _is_number(value)} for block in blocks]
    columns = [key for key in dict.fromkeys(key for block in blocks for key in block) if any(key in k for k in kinds)]
    if not columns:
        return ""
    rows = [[str(index), *(_number(block.get(key)) for key in columns)] for index, block in enumerate(blocks)]
    if len(rows) > _SHOWN:
        rows = [*rows[: _SHOWN // 2], ["…"] * (len(columns) + 1), *rows[-_SHOWN // 2 :]]
    return f"## Blocks\n\n{_table(['block', *columns], rows)}"


def _is_number(value: Any) -> bool:
    return isinstance(value, Real) and not isinstance(value, bool)


def _number(value: Any) -> str:
    return f"{value:.4g}" if _is_number(value) else ""


def _table(head: Sequence[str], rows: Sequence[Sequence[Any]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(str(cell).replace("|", "\\|") for cell in line) + " |" for line in lines)
