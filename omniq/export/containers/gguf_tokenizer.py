# SPDX-License-Identifier: Apache-2.0
"""A tokenizer of transformers as the metadata of a GGUF file.

llama.cpp has two kinds of tokenizers that matter here, and both come from the JSON of the fast tokenizer:

    gpt2    byte-level BPE: tokens and merges. How a text is split into words is a name (``tokenizer.ggml.pre``) that
            llama.cpp knows, so the splitting rule of the tokenizer must be one of ``_SPLITS``
    llama   SentencePiece: tokens and scores; llama.cpp merges the pair whose result has the highest score. The JSON has
            an ordered list of merges instead. The score of a token is minus the position of its first merge

Any other tokenizer is refused, because a wrong split gives wrong tokens without an error.
"""

import json
from typing import Any

from transformers import PreTrainedTokenizerBase

from omniq.errors import UserError
from omniq.export.containers.gguf_file import F32, I32, Value

_NORMAL, _UNKNOWN, _CONTROL, _USER, _UNUSED, _BYTE = 1, 2, 3, 4, 5, 6  # types of tokens in llama.cpp
_WORDS = r"|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}%s| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_SUFFIXES = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_SPLITS = {
    _SUFFIXES + _WORDS % "{1,3}": "llama-bpe",
    _SUFFIXES + _WORDS % "": "qwen2",
    "digits": "smollm",
    "": "gpt-2",
}
"""Names of rules in llama.cpp. A rule is a regular expression, ``digits`` for single digits, or only that of GPT-2."""


def tokenizer_metadata(tokenizer: PreTrainedTokenizerBase, size: int) -> dict[str, Value]:
    """The keys by which llama.cpp reads a tokenizer.

    Args:
        tokenizer: the tokenizer of the model.
        size: number of rows of the embedding; unused rows get a name.

    Raises:
        UserError: llama.cpp has no such tokenizer, or omniq does not know the name of its rule.
    """
    if not tokenizer.is_fast:
        raise _refusal("is not a fast tokenizer of transformers")
    content = json.loads(tokenizer.backend_tokenizer.to_str())
    model = content["model"]
    if model.get("type") != "BPE":
        raise _refusal(f"is of type {model.get('type')}, not BPE")
    tokens = {index: token for token, index in model["vocab"].items()}
    types = dict.fromkeys(tokens, _NORMAL)
    for added in content["added_tokens"]:
        tokens[added["id"]] = added["content"]
        types[added["id"]] = _CONTROL if added["special"] else _USER
    pairs = [pair.split(" ", 1) if isinstance(pair, str) else pair for pair in model["merges"]]
    own = _sentencepiece(content, tokens, types, pairs) if model.get("byte_fallback") else _byte_level(content, pairs)
    names = [tokens.get(index, f"[PAD{index}]") for index in range(size)]
    return {
        **own,
        "tokenizer.ggml.tokens": Value.texts(names),
        "tokenizer.ggml.token_type": Value.numbers(I32, [types.get(index, _UNUSED) for index in range(size)]),
        **({"tokenizer.ggml.scores": _scores(names, pairs)} if model.get("byte_fallback") else {}),
        **_special(tokenizer),
    }


def _byte_level(content: dict[str, Any], pairs: list[list[str]]) -> dict[str, Value]:
    given = content.get("pre_tokenizer") or {}
    parts = given.get("pretokenizers", [given])
    rules = [part for part in parts if part.get("type") != "ByteLevel"]
    rule = _rule(rules[0]) if rules else ""
    plain = [part for part in parts if part.get("type") == "ByteLevel" and not part.get("add_prefix_space")]
    if len(rules) > 1 or len(plain) != 1 or rule not in _SPLITS:
        raise _refusal(f"splits a text by the rule {json.dumps(given)[:120]}, which has no name in llama.cpp")
    return {
        "tokenizer.ggml.model": Value.text("gpt2"),
        "tokenizer.ggml.pre": Value.text(_SPLITS[rule]),
        "tokenizer.ggml.merges": Value.texts([" ".join(pair) for pair in pairs]),
    }


def _rule(part: dict[str, Any]) -> str | None:
    """The rule of a pre-tokenizer as a key of ``_SPLITS``; None for other kinds."""
    if part.get("type") == "Digits":
        return "digits" if part.get("individual_digits") else None
    regex = part.get("pattern", {}).get("Regex")
    return regex if part.get("type") == "Split" and part.get("behavior") == "Isolated" else None


def _sentencepiece(
    content: dict[str, Any], tokens: dict[int, str], types: dict[int, int], pairs: list[list[str]]
) -> dict[str, Value]:
    unknown = content["model"].get("unk_token")
    for index, token in tokens.items():
        if token.startswith("<0x") and token.endswith(">") and len(token) == 6:
            types[index] = _BYTE
        elif token == unknown:
            types[index] = _UNKNOWN
    text = json.dumps([content.get("normalizer"), content.get("pre_tokenizer")], ensure_ascii=False)
    prefix = '"Prepend"' in text or '"prepend_scheme": "first"' in text or '"prepend_scheme": "always"' in text
    return {"tokenizer.ggml.model": Value.text("llama"), "tokenizer.ggml.add_space_prefix": Value.flag(prefix)}


def _scores(names: list[str], pairs: list[list[str]]) -> Value:
    rank: dict[str, int] = {}
    for position, pair in enumerate(pairs):
        rank.setdefault("".join(pair), position)
    return Value.numbers(F32, [float(-rank.get(name, len(pairs))) for name in names])


def _special(tokenizer: PreTrainedTokenizerBase) -> dict[str, Value]:
    """Numbers of the special tokens, whether a text gets some of them, and the chat template."""
    ends = {"bos": tokenizer.bos_token_id, "eos": tokenizer.eos_token_id}
    given = tokenizer("a").input_ids
    found = {f"add_{name}_token": Value.flag(ends[name] == given[at]) for name, at in (("bos", 0), ("eos", -1))}
    numbers = {**ends, "unknown": tokenizer.unk_token_id, "padding": tokenizer.pad_token_id}
    found |= {f"{name}_token_id": Value.integer(number) for name, number in numbers.items() if number is not None}
    keys = {f"tokenizer.ggml.{key}": value for key, value in found.items()}
    template = tokenizer.chat_template
    return keys | ({"tokenizer.chat_template": Value.text(template)} if isinstance(template, str) else {})


def _refusal(problem: str) -> UserError:
    return UserError(
        f"export.format gguf: the tokenizer {problem}: use another format, or start from a GGUF "
        "file of this model, whose tokenizer is copied"
    )
