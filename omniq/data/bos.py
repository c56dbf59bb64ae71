# SPDX-License-Identifier: Apache-2.0
"""Where windows of tokens begin with BOS, the token that marks the beginning of a text.

- ``window``: every window begins with BOS, as every prompt does when the model runs.
- ``text``: the tokenizer adds its special tokens to the whole text, so at most the first window begins with BOS. This
  is the protocol of GPTQ and OmniQuant (arXiv 2308.13137), and of the published tables.
- ``none``: no window begins with BOS.

A model that was trained with BOS before every text may fail without it: a Gemma model had a perplexity of 70 with
``text`` and 26 with ``window``. Therefore ``window`` is the default if the tokenizer adds BOS by itself. LLaMA and OPT
keep ``text``, because their published tables use it.
"""

from typing import TYPE_CHECKING, Any, Literal

from omniq.errors import UserError

if TYPE_CHECKING:  # settings are parsed without torch
    from torch import Tensor

Bos = Literal["window", "text", "none"]
PUBLISHED = ("llama", "opt")  # model types whose published tables use ``text``


def place_of_bos(
    chosen: Bos | None, add_special_tokens: bool, tokenizer: Any, model_type: str | None, field: str
) -> Bos:
    """The place of BOS for a model.

    Args:
        chosen: the setting; None for the default.
        add_special_tokens: the setting; false asks for ``none``.
        tokenizer: of the model, from transformers.
        model_type: type of the model, if it is known.
        field: section of the settings, for messages.

    Raises:
        UserError: ``window`` is chosen for a tokenizer without BOS, or ``text`` without special tokens.
    """
    if chosen == "window" and _bos_of(tokenizer) is None:
        raise UserError(f"{field}.bos window: the tokenizer of this model has no BOS token: use text or none")
    if chosen == "text" and not add_special_tokens:
        raise UserError(f"{field}.bos text contradicts {field}.add_special_tokens false: remove one of them")
    if chosen is not None:
        return chosen
    if not add_special_tokens:
        return "none"
    return "window" if model_type not in PUBLISHED and _adds_bos(tokenizer) else "text"


def begin_with_bos(windows: "Tensor", tokenizer: Any) -> "Tensor":
    """Put BOS before every window, ``[n, t]`` to ``[n, t + 1]``."""
    import torch

    return torch.cat([windows.new_full((len(windows), 1), _bos_of(tokenizer)), windows], dim=1)


def _bos_of(tokenizer: Any) -> Any:
    return getattr(tokenizer, "bos_token_id", None)


def _adds_bos(tokenizer: Any) -> bool:
    bos = _bos_of(tokenizer)
    return bos is not None and tokenizer("a")["input_ids"][:1] == [bos]
