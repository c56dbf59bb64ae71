# SPDX-License-Identifier: Apache-2.0
"""Windows of tokens: those of calibration are drawn at random, those of evaluation follow each other."""

import logging
from dataclasses import dataclass

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers.processors import TemplateProcessing
from transformers import PreTrainedTokenizerFast

from omniq.data import Calibration, Evaluation, HubText, LocalText, TextSource, digest
from omniq.errors import UserError
from tests.helpers.tiny import tiny_tokenizer


@dataclass(frozen=True)
class Words(TextSource):
    """Text of a known number of bytes, which are tokens to the tiny tokenizer."""

    content: str

    def documents(self) -> list[str]:
        return [self.content]

    def describe(self) -> str:
        return "words"


class Numbers:
    """A tokenizer whose n-th token is n."""

    def __call__(self, text: str, **options: object) -> dict[str, list[int]]:
        return {"input_ids": list(range(len(text)))}


@settings(max_examples=40, deadline=None)
@given(
    length=st.integers(2, 20),
    samples=st.integers(1, 30),
    held_out=st.integers(0, 5),
    spare=st.integers(0, 50),
    seed=st.integers(0, 2**31),
)
def test_calibration_windows_lie_before_held_out_tail(length, samples, held_out, spare, seed):
    total = (1 + held_out) * length + spare
    data = Calibration(Words("x" * total), samples, length, held_out)
    drawn, again = data.windows(Numbers(), seed), data.windows(Numbers(), seed)
    assert drawn.calibration.shape == (samples, length)
    assert drawn.held_out.shape == (held_out, length)
    assert drawn.calibration.dtype == drawn.held_out.dtype == torch.int64
    assert digest(drawn.calibration) == digest(again.calibration)
    # tokens are their own positions: windows are contiguous, and calibration ends before the held-out part starts
    assert (drawn.calibration.diff(dim=1) == 1).all()
    assert drawn.calibration.min() >= 0
    assert drawn.calibration.max() < total - held_out * length
    assert drawn.held_out.flatten().tolist() == list(range(total - held_out * length, total))
    assert drawn.distinct == (total - held_out * length) // length


def test_calibration_offsets_are_uniform_up_to_both_ends():
    drawn = Calibration(Words("x" * 14), samples=4000, length=5).windows(Numbers(), 0).calibration[:, 0]
    counts = np.bincount(drawn.numpy(), minlength=10)
    assert len(counts) == 10
    assert abs(counts - 400).max() < 80  # four standard deviations; measured 32


def test_calibration_without_seed_uses_seed_of_run():
    source = Words("x" * 1000)
    run = Calibration(source, 8, 10).windows(Numbers(), 3)
    assert torch.equal(run.calibration, Calibration(source, 8, 10, seed=3).windows(Numbers(), 9).calibration)
    assert not torch.equal(run.calibration, Calibration(source, 8, 10).windows(Numbers(), 4).calibration)


@settings(max_examples=30, deadline=None)
@given(length=st.integers(2, 20), total=st.integers(20, 200), most=st.none() | st.integers(1, 6))
def test_evaluation_windows_are_consecutive(length, total, most):
    windows = Evaluation(Words("x" * total), length, most).sequences(Numbers())
    count = min(total // length, most or total)
    assert windows.shape == (count, length)
    assert windows.flatten().tolist() == list(range(count * length))


def test_evaluation_text_gets_special_tokens_once():
    tokenizer = tiny_tokenizer()
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 256)])
    source = Words("abc" * 20)
    windows = Evaluation(source, 10).sequences(tokenizer, "llama")
    assert windows[0, 0] == 256
    assert (windows == 256).sum() == 1  # at the very start only
    assert not (Evaluation(source, 10, add_special_tokens=False).sequences(tokenizer) == 256).any()


def test_evaluation_text_longer_than_model_maximum_gives_no_warning(caplog, capfd):
    tokenizer = tiny_tokenizer()
    tokenizer.model_max_length = 16
    logging.getLogger("transformers").propagate = True
    Evaluation(Words("a" * 100), 10).sequences(tokenizer)
    assert not caplog.records
    assert not capfd.readouterr().err


def test_windows_of_too_short_text_are_refused_with_numbers():
    with pytest.raises(
        UserError, match=r"data\.source: the text is too short: one window needs 2048 tokens, found 5; give more text"
    ):
        Calibration(Words("hello")).windows(tiny_tokenizer(), 0)
    with pytest.raises(UserError, match=r"one window of 4 and 2 held out needs 12 tokens, found 11; .* data\.held_out"):
        Calibration(Words("hello world"), length=4, held_out=2).windows(tiny_tokenizer(), 0)
    with pytest.raises(UserError, match=r"evaluation\.source: .*one window needs 20 tokens, found 11; .*\.length"):
        Evaluation(Words("hello world"), 20).sequences(tiny_tokenizer())


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda source: Calibration(source, samples=0), r"data\.samples: 0 is too few; give 1 or more"),
        (lambda source: Calibration(source, length=1), r"data\.length: 1 is too few; give 2 or more"),
        (lambda source: Calibration(source, held_out=-1), r"data\.held_out: -1 is too few; give 0 or more"),
        (lambda source: Evaluation(source, length=0), r"evaluation\.length: 0 is too few; give 2 or more"),
        (lambda source: Evaluation(source, max_windows=0), r"evaluation\.max_windows: 0 is too few; give 1 or more"),
        (lambda _: LocalText("x.jsonl", max_documents=0), r"LocalText\.max_documents: 0 is too few; give 1 or more"),
        (lambda _: HubText("x/y", max_documents=-1), r"HubText\.max_documents: -1 is too few; give 1 or more"),
    ],
)
def test_windows_of_bad_size_are_refused_when_created(make, message):
    with pytest.raises(UserError, match=message):
        make(Words("x"))


def test_digest_differs_by_values_and_shape():
    tokens = torch.arange(12).view(3, 4)
    assert digest(tokens) == digest(tokens.t().contiguous().t()) == digest(tokens.to(torch.int32))
    assert len({digest(tokens), digest(tokens.view(4, 3)), digest(tokens + 1), digest(tokens.flatten())}) == 4


def test_windows_description_says_how_they_are_made():
    source = Words("x")
    assert Calibration(source, 8, 64).describe() == "8 random windows of 64 tokens from words"
    assert Evaluation(source, 64).describe() == "all consecutive windows of 64 tokens of words"
    assert Evaluation(source, 64, 3).describe() == "the first 3 consecutive windows of 64 tokens of words"


def tokenizer_that_adds_bos() -> PreTrainedTokenizerFast:
    tokenizer = tiny_tokenizer()
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 256)])
    return tokenizer


@pytest.mark.parametrize(
    ("chosen", "adds", "model_type", "place"),
    [
        (None, True, "gemma", "window"),
        (None, True, None, "window"),
        (None, True, "llama", "text"),
        (None, True, "opt", "text"),
        (None, False, "gemma", "text"),
        ("none", True, "gemma", "none"),
        ("text", True, "gemma", "text"),
        ("window", False, "llama", "window"),
    ],
)
def test_windows_begin_with_bos_where_setting_or_default_says(chosen, adds, model_type, place):
    tokenizer = tokenizer_that_adds_bos() if adds else tiny_tokenizer()
    text = Words("".join(chr(97 + index % 26) for index in range(200)))
    data, evaluation = Calibration(text, 8, 10, 2, bos=chosen), Evaluation(text, 10, bos=chosen)
    assert data.place_of_bos(tokenizer, model_type) == evaluation.place_of_bos(tokenizer, model_type) == place
    drawn, windows = data.windows(tokenizer, 0, model_type), evaluation.sequences(tokenizer, model_type)
    for part in (*drawn[:2], windows):
        assert part.shape[1] == 10
        assert ((part == 256).sum(1) == (part[:, 0] == 256)).all()  # nowhere else
    if place == "window":
        assert all((part[:, 0] == 256).all() for part in (*drawn[:2], windows))
        tokens = tiny_tokenizer()(text.content, return_tensors="pt").input_ids[0]
        assert torch.equal(windows[:, 1:].flatten(), tokens[:198])
        assert torch.equal(drawn.held_out[:, 1:].flatten(), tokens[182:])
    else:
        assert (windows == 256).sum() == (adds and place == "text")


def test_windows_with_impossible_bos_are_refused():
    text = Words("x" * 100)
    with pytest.raises(UserError, match=r"data\.bos window: the tokenizer of this model has no BOS token: use text or"):
        Calibration(text, 2, 10, bos="window").windows(Numbers(), 0)
    with pytest.raises(
        UserError, match=r"evaluation\.bos text contradicts evaluation\.add_special_tokens false: remove"
    ):
        Evaluation(text, 10, add_special_tokens=False, bos="text").sequences(Numbers())


def test_description_of_evaluation_says_where_bos_is():
    evaluation = Evaluation(Words("x" * 100), 10)
    assert [evaluation.describe(place).rpartition("words")[2] for place in ("window", "text", "none")] == [
        ", each with BOS",
        "",
        ", without BOS",
    ]
