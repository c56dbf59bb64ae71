# SPDX-License-Identifier: Apache-2.0
"""Calibration text that the full-precision model itself writes, for a user without text.

As in LLM-QAT (arXiv 2305.17888, section 3.1), each window is one text:

1. its first token is drawn uniformly from the vocabulary, after the begin-of-text token if the tokenizer adds one;
2. the next ``greedy`` tokens are the most probable ones;
3. each further token is drawn from the softmax of the logits.

The number ``u`` in [0, 1) that draws a token belongs to its place in its window and depends only on the seed. The token
is the first one at which the cumulative probability exceeds ``u``. A window therefore does not depend on the batch or
the process that it is drawn in, except for rounding.

Deviations from the published code: special tokens are never drawn, so a window is one text that fills it; the number of
greedy tokens is fixed, where the paper uses 3 to 5.

Shapes: ``b`` windows, ``t`` tokens of a window, ``v`` vocabulary.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from omniq.data.text import TextSource, at_least
from omniq.errors import UserError

if TYPE_CHECKING:  # settings are parsed without torch
    from torch import Tensor

Continue = Callable[["Tensor"], "Tensor"]
"""Appends tokens ``[b, n]`` to the texts of the model, and returns the logits of the next token, ``[b, v]``."""


@dataclass(frozen=True)
class SelfGenerated(TextSource):
    """Text that the full-precision model writes before the calibration. Only ``data.source`` accepts it.

    The whole model must fit in the memory of the device. One window costs ``data.length`` forward passes of one token;
    a batch of windows shares them. The run directory keeps the windows, so a resumed run does not draw them again.

    Args:
        batch: number of windows that the model writes at the same time.
        greedy: number of tokens after the random first one that are the most probable ones.
    """

    batch: int = 32
    greedy: int = 4

    def __post_init__(self) -> None:
        at_least("SelfGenerated.batch", self.batch, 1)
        at_least("SelfGenerated.greedy", self.greedy, 0)

    def documents(self) -> list[str]:
        """Refuse a use without a model.

        Raises:
            UserError: always.
        """
        raise UserError(
            "omniq.data.SelfGenerated has no text to evaluate on, because the model writes it: use it as data.source, "
            "and give another evaluation.source, such as omniq.data.Stdlib"
        )

    def describe(self) -> str:
        """The origin of the text."""
        return "text that the full-precision model generated (after LLM-QAT, arXiv 2305.17888)"


def draw_windows(model: Continue, first: "Tensor", allowed: "Tensor", uniforms: "Tensor", greedy: int) -> "Tensor":
    """Draw windows of tokens from a model, int64 ``[b, t]``.

    Args:
        model: a model without text so far.
        first: int64 ``[p]``: tokens with which each window begins.
        allowed: int64 ``[a]``: the tokens that may be drawn, sorted.
        uniforms: float64 ``[b, t]`` in [0, 1), one number for each token of each window.
        greedy: number of most probable tokens after the random one.
    """
    import torch

    start = len(first)
    random = allowed[(uniforms[:, start] * len(allowed)).long()]
    new = torch.cat([first.expand(len(uniforms), -1), random[:, None]], 1)  # [b, p + 1]
    parts = [new]
    for position in range(start + 1, uniforms.shape[1]):
        logits = model(new)[:, allowed].double()
        if position <= start + greedy:
            index = logits.argmax(1, keepdim=True)
        else:
            below = logits.softmax(1).cumsum(1)
            index = torch.searchsorted(below, uniforms[:, position, None] * below[:, -1:], right=True)
        new = allowed[index.clamp_max(len(allowed) - 1)]  # [b, 1]
        parts.append(new)
    return torch.cat(parts, 1)[:, : uniforms.shape[1]]


def text_tokens(tokenizer: Any, vocabulary: int) -> "Tensor":
    """The tokens that may stand in a text: those of the tokenizer and the model, without special ones; int64, sorted.

    Args:
        tokenizer: of the model, from transformers.
        vocabulary: number of logits of the model, which may exceed the number of tokens.
    """
    import torch

    special = {number for number, token in tokenizer.added_tokens_decoder.items() if token.special}
    special |= set(tokenizer.all_special_ids)
    return torch.tensor([token for token in range(min(len(tokenizer), vocabulary)) if token not in special])


def first_tokens(tokenizer: Any, add_special_tokens: bool) -> "Tensor":
    """The begin-of-text token, if the tokenizer adds it to a text; int64 ``[0 or 1]``."""
    import torch

    added = tokenizer("", add_special_tokens=add_special_tokens)["input_ids"]
    return torch.tensor([token for token in added[:1] if token == tokenizer.bos_token_id], dtype=torch.int64)
