# SPDX-License-Identifier: Apache-2.0
"""Initial values of a transform against SmoothQuant and Outlier Suppression+, channel by channel."""

import pytest
import torch
from torch import Tensor

from omniq.errors import UserError
from omniq.models.families.opt import OPT
from omniq.transforms.equivalences import NormToLinears, UpToDown, ValueToOutput
from omniq.transforms.heads import Heads
from omniq.transforms.initial import ChannelRanges
from omniq.transforms.transform import Transform
from tests.helpers.tiny import tiny_block


def channel_sizes(x: Tensor, weights: list[Tensor], alpha: float, shift: bool) -> tuple[list[float], list[float]]:
    """SmoothQuant's log scale and Outlier Suppression+'s shift, one channel after the other."""
    scales, shifts = [], []
    for j in range(x.shape[-1]):
        column = x[..., j].flatten().tolist()
        middle = (max(column) + min(column)) / 2 if shift else 0.0
        reach = max(abs(value - middle) for value in column)
        weight = max(abs(value) for w in weights for value in w[:, j].tolist())
        scales.append(alpha * torch.tensor(reach).log().item() - (1 - alpha) * torch.tensor(weight).log().item())
        shifts.append(middle)
    return scales, shifts


def ranges_of(x: Tensor, *names: str) -> ChannelRanges:
    """The ranges of an input ``[..., i]`` that these linears read."""
    lo, hi = x.flatten(0, -2).aminmax(dim=0)
    return ChannelRanges(dict.fromkeys(names, lo), dict.fromkeys(names, hi))


@pytest.mark.parametrize("alpha", [0.0, 0.5, 1.0])
def test_initial_of_norm_equals_formula(alpha: float) -> None:
    block, _ = tiny_block("opt")
    tensors = dict(block.named_parameters())
    transform = Transform(OPT.equivalences, Heads(4, 4), tensors)
    batches = [torch.randn(2, 7, 64) * torch.rand(64) + torch.randn(64) for _ in range(3)]
    ranges = ranges_of(torch.cat(batches), "self_attn.q_proj", "self_attn.out_proj", "fc1")
    values = transform.initial(tensors, ranges, alpha)
    assert {name for name in transform.shapes if not name.startswith(("self_attn/q_proj", "fc1"))} == set(values)
    weights = [tensors[f"self_attn.{name}_proj.weight"] for name in "qkv"]
    scales, shifts = channel_sizes(torch.cat(batches), weights, alpha, shift=True)
    torch.testing.assert_close(values["self_attn_layer_norm/log_scale"], torch.tensor(scales), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(values["self_attn_layer_norm/shift"], torch.tensor(shifts), rtol=1e-5, atol=1e-6)
    plain = transform.initial(tensors, ranges, alpha, shift=False)
    scales, _ = channel_sizes(torch.cat(batches), weights, alpha, shift=False)
    assert "self_attn_layer_norm/shift" not in plain
    torch.testing.assert_close(plain["self_attn_layer_norm/log_scale"], torch.tensor(scales), rtol=1e-5, atol=1e-5)
    assert transform.initial(tensors, ranges, None, shift=False) == {}


def test_initial_of_kv_head_takes_all_its_readers() -> None:
    heads = Heads(4, 2)  # channel 1 of KV head 1 is read by query heads 2 and 3: inputs 7 and 10 of the output
    tensors = {"v.weight": torch.ones(6, 5), "o.weight": torch.full((5, 12), 0.5)}
    transform = Transform((ValueToOutput("v", "o"),), heads, tensors, {"v", "o"})
    x = torch.zeros(1, 2, 12)
    x[0, :, 7], x[0, :, 10] = torch.tensor([-1.0, 3.0]), torch.tensor([0.0, 9.0])
    tensors["o.weight"][2, 10] = -4.0
    ranges = ranges_of(x, "o")
    values = transform.initial(tensors, ranges)
    assert values["v/shift"].tolist() == [0.0, 0.0, 0.0, 0.0, 4.0, 0.0]  # the middle of -1 .. 9
    torch.testing.assert_close(values["v/log_scale"][4].exp(), torch.tensor((5.0 / 4.0) ** 0.5))
    moved = transform.apply(tensors, transform.parameters(values))
    assert moved["o.bias"].shape == (5,)


def test_initial_of_dead_channel_is_finite() -> None:
    tensors = {"norm.weight": torch.ones(3), "up.weight": torch.tensor([[1.0, 0.0, 2.0]])}
    transform = Transform((NormToLinears("norm", ("up",)),), Heads(1, 1), tensors)
    ranges = ranges_of(torch.tensor([[0.0, 1.0, 1.0], [0.0, -2.0, 1.0]]), "up")
    for alpha in (0.0, 0.5, 1.0):
        assert transform.initial(tensors, ranges, alpha)["norm/log_scale"].isfinite().all()


@pytest.mark.parametrize("alpha", [-0.1, 1.5])
def test_initial_alpha_outside_unit_interval_is_refused(alpha: float) -> None:
    with pytest.raises(UserError, match=f"alpha {alpha} is outside 0 to 1"):
        Transform((), Heads(1, 1), {}).initial({}, ChannelRanges(), alpha)


def test_initial_of_power_is_root_of_scale() -> None:
    """The input of ``down`` is divided by ``s^2``, so ``s`` starts at the square root."""
    tensors = {"up.weight": torch.ones(3, 2), "down.weight": torch.tensor([[1.0, 2.0, 3.0]])}
    ranges = ranges_of(torch.tensor([[4.0, 1.0, 2.0]]), "down")
    once, twice = (
        Transform((UpToDown("up", "down", power=power),), Heads(1, 1), tensors).initial(tensors, ranges)
        for power in (1, 2)
    )
    torch.testing.assert_close(once["up/log_scale"], 2 * twice["up/log_scale"])


def test_initial_without_range_of_reader_is_empty() -> None:
    tensors = {"norm.weight": torch.ones(2), "kept.weight": torch.ones(3, 2)}
    transform = Transform((NormToLinears("norm", ("kept",)),), Heads(1, 1), tensors)
    assert transform.initial(tensors, ChannelRanges()) == {}
