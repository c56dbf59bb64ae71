# SPDX-License-Identifier: Apache-2.0
"""The model card: what a stranger must know to load the checkpoint, judge it, and make it again.

A pure function of facts; the same facts give the same text, so there is no date in it. A section whose facts are not
given is left out.
"""

import re
import shlex
from collections.abc import Mapping, Sequence
from numbers import Real
from typing import Any

import yaml

_TAG = "omniq"
_READER = "transformers>=5.17"  # the oldest whose reading of our checkpoints was checked
_SHOWN = 16  # blocks listed one by one; of more, the first and last eight


def model_card(facts: Mapping[str, Any]) -> str:
    """Write the card.

    Args:
        facts: any of

            ``name``: of the checkpoint folder; ``base_model``: hub name or folder of the source model;
            ``scheme``: such as ``W3A16g64``; ``method``: in a few words;
            ``format`` and ``requires``: the layout, and requirements of a reader beside transformers;
            ``bits_per_weight``: of codes (at their own width), scales, zero points and outliers; ``bytes``: of all
            tensors, as the format stores them;
            ``perplexity``: by text, then by model, lower is better;
            ``blocks``: the summary of each block, numbers by name (losses, seconds);
            ``recipe``: the configuration as YAML; ``seed``; ``source_digest``: of the source model;
            ``data``: origin, digest and sizes of the calibration text; ``versions``: of the packages used.

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
    """Whether a text is a card that ``model_card`` has written, by the tag in its front matter."""
    head = text.removeprefix("---\n").partition("\n---")[0]
    try:
        found = yaml.safe_load(head) if text.startswith("---\n") else None
    except (yaml.YAMLError, ValueError):  # the latter for a date that there is not
        return False
    tags = found.get("tags") if isinstance(found, dict) else None
    return isinstance(tags, list) and _TAG in tags


def _front_matter(facts: Mapping[str, Any]) -> str:
    head: dict[str, Any] = {"library_name": "transformers", "pipeline_tag": "text-generation"}
    tags = [_TAG, "quantized", facts.get("format"), facts.get("scheme")]
    head["tags"] = list(dict.fromkeys(tag for tag in tags if tag))  # the format may be omniq, too
    if _is_hub_name(base := str(facts.get("base_model", ""))):
        head |= {"base_model": base, "base_model_relation": "quantized"}
    return f"---\n{yaml.safe_dump(head, sort_keys=False, allow_unicode=True).strip()}\n---"


def _is_hub_name(base: str) -> bool:
    """``owner/name``; a folder or file on someone's machine is nobody's business."""
    return re.fullmatch(r"\w[\w.-]*/\w[\w.-]*", base) is not None and not base.endswith(".gguf")


def _heading(facts: Mapping[str, Any]) -> str:
    base = str(facts.get("base_model", "")).rstrip("/")
    base = base if _is_hub_name(base) else base.rpartition("/")[2]
    how = [f"in {facts['scheme']}"] if "scheme" in facts else []
    how += [f"with {facts['method']}"] if "method" in facts else []
    text = f"{base or 'A language model'}, quantized by omniq" + (f" {' '.join(how)}" if how else "") + "."
    if "bits_per_weight" in facts:
        text += (
            " The codes of the quantized linears, with their scales, zero points and outliers, come to "
            f"{facts['bits_per_weight']:.3f} bits per weight; all other parameters stay floating-point."
        )
    if "bytes" in facts:
        text += f" The tensors take {facts['bytes'] / 1e6:,.1f} MB."
    return f"# {facts.get('name', 'model')}\n\n{text}"


def _loading(facts: Mapping[str, Any]) -> str:
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
