# SPDX-License-Identifier: Apache-2.0
"""Windows of tokens: random ones to calibrate on, consecutive ones to evaluate on.

The documents of a source are joined (by a blank line, unless the source sets another separator) and tokenized once, as
one string. A window of ``length`` tokens consists of as many tokens of the text, or of BOS and one token less
(``omniq.data.bos``). The ``n`` tokens of the text give:

* calibration: ``samples`` windows at uniformly random offsets, which may overlap (OmniQuant, arXiv 2308.13137, and
  GPTQ before it: 128 windows of 2048);
* held-out: the last ``held_out * length`` tokens, cut into consecutive windows. Calibration windows are drawn from the
  tokens before them, so the loss on the held-out windows is a loss on unseen text;
* evaluation: all ``floor(n / length)`` consecutive windows; the tail is dropped (the protocol of GPTQ and OmniQuant).

Deviations from the published code: offsets come from a separate generator and not from Python's global one, so they
depend only on text, tokenizer, sizes and seed; the last possible offset can be drawn; the tokenizer is that of the
model (the paper used the slow variant, which transformers no longer has).
"""

import hashlib
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

from omniq.data.bos import Bos, begin_with_bos, place_of_bos
from omniq.data.text import TextSource, at_least
from omniq.errors import UserError

if TYPE_CHECKING:  # settings are parsed without torch
    from torch import Tensor


class Windows(NamedTuple):
    """The tokens that calibrate a block, and those that its loss is watched on.

    Args:
        calibration: int64 ``[samples, length]``.
        held_out: int64 ``[held_out, length]``; shares no token of the text with ``calibration``.
        distinct: the number of windows without a common token that the text for calibration holds.
    """

    calibration: "Tensor"
    held_out: "Tensor"
    distinct: int


@dataclass(frozen=True)
class Calibration:
    """The text that stages calibrate on.

    Args:
        source: where the text comes from.
        samples: number of random windows. The paper uses 128. For its weight-only quantization 16 suffice (Table A11:
            perplexity 6.47 at W3A16 with 16 and with 128). If the text holds fewer windows, omniq prints a line.
        length: tokens per window.
        held_out: number of additional windows, on which the loss is measured but not optimized.
        seed: seed of the random offsets. By default the seed of the run.
        add_special_tokens: let the tokenizer add its special tokens to the whole text, as it does by default.
        bos: ``window`` to begin every window with BOS, ``text`` to begin only the text with it, or ``none``. By default
            ``window`` if the tokenizer adds BOS by itself, but ``text`` for LLaMA and OPT.
    """

    source: TextSource
    samples: int = 128
    length: int = 2048
    held_out: int = 0
    seed: int | None = None
    add_special_tokens: bool = True
    bos: Bos | None = None

    def __post_init__(self) -> None:
        at_least("data.samples", self.samples, 1)
        at_least("data.length", self.length, 2)  # one token predicts the next
        at_least("data.held_out", self.held_out, 0)

    def place_of_bos(self, tokenizer: Any, model_type: str | None = None) -> Bos:
        """Where windows for this model begin with BOS."""
        return place_of_bos(self.bos, self.add_special_tokens, tokenizer, model_type, "data")

    def windows(self, tokenizer: Any, seed: int, model_type: str | None = None) -> Windows:
        """Draw the windows.

        Args:
            tokenizer: of the model, from transformers.
            seed: of the run; used unless ``self.seed`` is set.
            model_type: type of the model; the default of ``bos`` depends on it.

        Raises:
            UserError: the text cannot be read, or is too short for one calibration window beside the held-out ones.
        """
        import torch

        bos = self.place_of_bos(tokenizer, model_type)
        tokens = tokenize(self.source, tokenizer, bos == "text")
        length = self.length - (bos == "window")
        needed = (1 + self.held_out) * length
        if len(tokens) < needed:
            parts = f"one window of {self.length} and {self.held_out} held out" if self.held_out else "one window"
            raise UserError(
                f"data.source: the text is too short: {parts} needs {needed} tokens, found {len(tokens)}; "
                "give more text, or lower data.length or data.held_out"
            )
        tail = len(tokens) - self.held_out * length
        generator = torch.Generator().manual_seed(seed if self.seed is None else self.seed)
        offsets = torch.randint(tail - length + 1, (self.samples, 1), generator=generator)
        drawn = tokens[offsets + torch.arange(length)]
        held_out = tokens[tail:].view(self.held_out, length).clone()
        if bos == "window":
            drawn, held_out = begin_with_bos(drawn, tokenizer), begin_with_bos(held_out, tokenizer)
        return Windows(calibration=drawn, held_out=held_out, distinct=tail // length)

    def describe(self) -> str:
        """One line for the model card."""
        return f"{self.samples} random windows of {self.length} tokens from {self.source.describe()}"


@dataclass(frozen=True)
class Evaluation:
    """The text that perplexity is measured on.

    Args:
        source: where the text comes from.
        length: tokens per window. Published perplexities use 2048.
        max_windows: number of windows to use, from the start of the text. By default all windows are used.
        add_special_tokens: let the tokenizer add its special tokens to the whole text, as it does by default.
        bos: ``window`` to begin every window with BOS, ``text`` to begin only the text with it, or ``none``. By default
            ``window`` if the tokenizer adds BOS by itself, but ``text`` for LLaMA and OPT.
    """

    source: TextSource
    length: int = 2048
    max_windows: int | None = None
    add_special_tokens: bool = True
    bos: Bos | None = None

    def __post_init__(self) -> None:
        at_least("evaluation.length", self.length, 2)
        at_least("evaluation.max_windows", self.max_windows, 1)

    def place_of_bos(self, tokenizer: Any, model_type: str | None = None) -> Bos:
        """Where windows for this model begin with BOS."""
        return place_of_bos(self.bos, self.add_special_tokens, tokenizer, model_type, "evaluation")

    def sequences(self, tokenizer: Any, model_type: str | None = None) -> "Tensor":
        """Cut the text into consecutive windows, int64 ``[n, length]``, and drop the tail.

        Args:
            tokenizer: of the model, from transformers.
            model_type: type of the model; the default of ``bos`` depends on it.

        Raises:
            UserError: the text cannot be read, or is too short for one window.
        """
        bos = self.place_of_bos(tokenizer, model_type)
        tokens = tokenize(self.source, tokenizer, bos == "text")
        length = self.length - (bos == "window")
        count = len(tokens) // length
        if not count:
            raise UserError(
                f"evaluation.source: the text is too short: one window needs {self.length} tokens, found {len(tokens)};"
                " give more text, or lower evaluation.length"
            )
        if self.max_windows is not None:
            count = min(count, self.max_windows)
        windows = tokens[: count * length].view(count, length).clone()
        return begin_with_bos(windows, tokenizer) if bos == "window" else windows

    def describe(self, bos: Bos = "text") -> str:
        """One line for the model card.

        Args:
            bos: where the windows begin with BOS.
        """
        some = f"the first {self.max_windows}" if self.max_windows else "all"
        begin = {"window": ", each with BOS", "text": "", "none": ", without BOS"}[bos]
        return f"{some} consecutive windows of {self.length} tokens of {self.source.describe()}{begin}"


def tokenize(source: TextSource, tokenizer: Any, add_special_tokens: bool = True) -> "Tensor":
    """The whole text of a source as int64 ``[n]``."""
    import torch

    encoded = tokenizer(
        source.text(),
        add_special_tokens=add_special_tokens,
        return_attention_mask=False,
        return_token_type_ids=False,
        verbose=False,  # otherwise it warns that the text is longer than the model's context, which is intended here
    )
    return torch.tensor(encoded["input_ids"], dtype=torch.int64)


def digest(tokens: "Tensor") -> str:
    """SHA-256 of the shape and the little-endian int64 values of ``tokens``, in hex."""
    import torch

    sha = hashlib.sha256(repr(tuple(tokens.shape)).encode())
    sha.update(tokens.to("cpu", torch.int64).contiguous().numpy().astype("<i8", copy=False).tobytes())
    return sha.hexdigest()
