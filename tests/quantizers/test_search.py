# SPDX-License-Identifier: Apache-2.0
"""The searched range is never worse than min-max, near the best there is, and the same every time."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from omniq.grid.affine import Grid
from omniq.quantizers import search
from omniq.quantizers.search import search_range
from tests.helpers.synthetic_layer import make_layer


def loss(weight: Tensor, grid: Grid, covered: tuple[Tensor, Tensor], second_moment: Tensor) -> Tensor:
    """``sum_j H_jj (w_j - Q(w_j))^2`` of each group through the grid itself, float64 ``[o, G]``."""
    scale, zero_point = grid.fit(*(end.double() for end in covered))
    rounded = grid.dequantize(grid.quantize(weight.double(), scale, zero_point), scale, zero_point)
    return grid.split((weight.double() - rounded).square() * second_moment.double()).sum(-1)


@st.composite
def layers(draw: st.DrawFn) -> tuple[Tensor, Grid, Tensor]:
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    groups, size = draw(st.integers(1, 3)), draw(st.integers(1, 40))
    grid = Grid(draw(st.integers(2, 8)), draw(st.sampled_from([-1, size])), draw(st.booleans()))
    weight = torch.randn(draw(st.integers(1, 5)), groups * size, generator=generator) ** 3
    weight += draw(st.sampled_from([0.0, 2.0, -2.0]))
    second_moment = torch.rand(groups * size, generator=generator) ** 4
    second_moment[: draw(st.integers(0, 2)) * size] = 0
    return weight, grid, second_moment


@settings(max_examples=50, deadline=None)
@given(layers())
def test_search_range_never_worse_nor_wider_than_min_max(layer: tuple[Tensor, Grid, Tensor]) -> None:
    weight, grid, second_moment = layer
    lo, hi = search_range(weight, grid, second_moment)
    lowest, highest = grid.range(weight)
    assert ((lo >= lowest) & (lo <= 0) & (hi >= 0) & (hi <= highest)).all()
    least, widest = (loss(weight, grid, each, second_moment) for each in ((lo, hi), (lowest, highest)))
    assert (least <= widest * (1 + 1e-3) + 1e-12).all()  # ties of the float32 search may fall the other way
    unseen = grid.split(second_moment.expand_as(weight)).sum(-1) == 0
    assert torch.equal(lo[unseen], lowest[unseen])
    assert torch.equal(hi[unseen], highest[unseen])


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_search_range_error_is_near_exhaustive_search(bits: int) -> None:
    """Against every pair of a fine grid of scales and all zero points."""
    weight, gram = make_layer(576, 576)
    weight, grid, second_moment = weight[::16], Grid(bits), gram.diagonal()
    found = loss(weight, grid, search_range(weight, grid, second_moment), second_moment)
    lowest, highest = grid.range(weight)
    best = torch.full_like(lowest, torch.inf)
    for share in torch.linspace(0.2, 1.1, 120).tolist():
        scale = share * (highest - lowest) / grid.max_code
        for zero_point in range(grid.max_code + 1):
            covered = (-zero_point * scale, (grid.max_code - zero_point) * scale)
            best = torch.minimum(best, loss(weight, grid, covered, second_moment))
    assert float(found.sum() / best.sum()) < 1.02  # measured 1.005 to 1.009
    assert float(found.sum() / loss(weight, grid, (lowest, highest), second_moment).sum()) < 0.8


def test_search_range_with_separate_ends_lowers_error(monkeypatch: pytest.MonkeyPatch) -> None:
    weight, gram = make_layer(96, 192, tokens=500)
    grid, second_moment = Grid(3), gram.diagonal()
    both = loss(weight, grid, search_range(weight, grid, second_moment), second_moment).sum()
    monkeypatch.setattr(search, "_ENDS", ())
    joint = loss(weight, grid, search_range(weight, grid, second_moment), second_moment).sum()
    assert both < 0.97 * joint  # measured 0.95


def test_search_range_chunk_size_keeps_bits(monkeypatch: pytest.MonkeyPatch) -> None:
    weight, gram = make_layer(50, 64, tokens=200)
    arguments = (weight.float(), Grid(4, 32), gram.diagonal().float())
    whole = search_range(*arguments)
    monkeypatch.setattr(search, "_CHUNK", {"cpu": 7 * 64})
    for mine, theirs in zip(whole, search_range(*arguments), strict=True):
        assert torch.equal(mine, theirs)


def test_search_range_zeroed_outliers_do_not_widen_range() -> None:
    weight, gram = make_layer(16, 64, tokens=200)
    spiked = weight.clone()
    spiked[:, 5] = 100.0
    without = search_range(spiked.index_fill(1, torch.tensor([5]), 0), Grid(3), gram.diagonal())
    assert (without[1] <= weight.amax()).all()


def test_search_range_second_moment_of_other_width_is_refused() -> None:
    with pytest.raises(ValueError, match=r"second moments \(7,\) are not one number for each of 8 inputs"):
        search_range(torch.randn(2, 8), Grid(4), torch.ones(7))
