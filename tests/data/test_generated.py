# SPDX-License-Identifier: Apache-2.0
"""Windows drawn from a model: the most probable tokens, then tokens in proportion to their probability."""

import pytest
import torch
from tokenizers.processors import TemplateProcessing
from torch import Tensor

from omniq.data import SelfGenerated
from omniq.data.generated import draw_windows, first_tokens, text_tokens
from omniq.errors import UserError
from tests.helpers.tiny import tiny_tokenizer


def uniforms(windows: int, length: int) -> Tensor:
    return torch.rand(windows, length, dtype=torch.float64, generator=torch.Generator().manual_seed(0))


def test_windows_draw_tokens_in_proportion_to_probability() -> None:
    probable = torch.tensor([0.5, 0.0, 0.3, 0.2])  # token 2 may not be drawn
    allowed = torch.tensor([0, 1, 3])
    drawn = draw_windows(
        lambda new: probable.log().expand(len(new), -1), torch.tensor([]).long(), allowed, uniforms(5000, 4), greedy=1
    )
    assert drawn.shape == (5000, 4)
    counts = torch.stack([(drawn == token).sum(0) for token in range(4)], 1) / 5000  # [t, v]
    assert counts[0].tolist() == pytest.approx([1 / 3, 1 / 3, 0, 1 / 3], abs=0.03)  # uniform; four standard deviations
    assert counts[1].tolist() == [1, 0, 0, 0]  # the most probable token
    for row in counts[2:]:
        assert row.tolist() == pytest.approx([5 / 7, 0, 0, 2 / 7], abs=0.03)
        assert row[1] == row[2] == 0


def test_windows_are_continued_from_their_own_tokens() -> None:
    """The model sees the first tokens once, and then each new token."""
    seen: list[Tensor] = []

    def successor(new: Tensor) -> Tensor:
        seen.append(new)
        return torch.nn.functional.one_hot((new[:, -1] + 1) % 9, 9).float() * 100

    drawn = draw_windows(successor, torch.tensor([8]), torch.arange(8), uniforms(6, 5), greedy=2)
    assert (drawn[:, 0] == 8).all()
    assert torch.equal(torch.cat(seen, 1), drawn[:, :-1])
    grows = drawn[:, 1] < 5
    assert grows.any()
    assert (drawn[grows].diff(dim=1)[:, 1:] == 1).all()


def test_window_does_not_depend_on_windows_beside_it() -> None:
    numbers, table = uniforms(4, 7), torch.randn(9, 9, generator=torch.Generator().manual_seed(1))
    draw = [lambda new: table[new[:, -1]], torch.tensor([0]), torch.arange(9)]
    whole = draw_windows(*draw, numbers, greedy=1)
    assert torch.equal(whole, torch.cat([draw_windows(*draw, row[None], greedy=1) for row in numbers]))
    assert torch.equal(whole[:, :4], draw_windows(*draw, numbers[:, :4], greedy=1))


def test_text_tokens_leave_out_special_tokens_and_spare_logits() -> None:
    tokenizer = tiny_tokenizer()
    assert text_tokens(tokenizer, 272).tolist() == list(range(256))
    assert text_tokens(tokenizer, 100).tolist() == list(range(100))


def test_first_tokens_are_begin_of_text_if_tokenizer_adds_it() -> None:
    tokenizer = tiny_tokenizer()
    assert first_tokens(tokenizer, True).tolist() == []
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 256)])
    assert first_tokens(tokenizer, True).tolist() == [256]
    assert first_tokens(tokenizer, False).tolist() == []


def test_self_generated_impossible_settings_are_refused() -> None:
    with pytest.raises(UserError, match=r"SelfGenerated\.batch: 0 is too few; give 1 or more"):
        SelfGenerated(batch=0)
    with pytest.raises(UserError, match=r"SelfGenerated\.greedy: -1 is too few; give 0 or more"):
        SelfGenerated(greedy=-1)
