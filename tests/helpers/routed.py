# SPDX-License-Identifier: Apache-2.0
"""A toy block with an expert: its middle linears receive some of the tokens, as in a mixture of experts."""

import torch
from torch import Tensor, nn

from omniq.calibration.task import BlockTask
from omniq.grid.affine import Grid
from omniq.models.layout import Layout
from omniq.transforms.heads import Heads

SIZE = 16
GROUPS = (("first",), ("expert.up", "expert.gate"), ("last",))


class RoutedBlock(nn.Module):
    """``x + last(first(x) + expert(first(x)))``; the expert adds to tokens whose channel 0 is above a threshold.

    Args:
        threshold: -inf sends every token to the expert, inf none.
        skips: do not call the expert for a batch without tokens for it; else call it on no rows.
    """

    def __init__(self, threshold: float, skips: bool = True) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.threshold, self.skips, self.completed = threshold, skips, 0
        self.expert = nn.Module()
        linears = [nn.Linear(SIZE, SIZE, bias=False) for _ in range(4)]
        self.first, self.expert.up, self.expert.gate, self.last = linears
        for linear in linears:
            linear.weight = nn.Parameter(torch.randn(SIZE, SIZE, generator=generator) / SIZE**0.5, requires_grad=False)

    def forward(self, hidden: Tensor) -> Tensor:
        x = self.first(hidden)
        rows = x.flatten(0, 1)
        (chosen,) = torch.where(hidden.flatten(0, 1)[:, 0] > self.threshold)
        if len(chosen) or not self.skips:
            seen = rows[chosen]
            rows = rows.index_add(0, chosen, torch.tanh(self.expert.gate(seen)) * self.expert.up(seen))
        y = hidden + self.last(rows.view_as(x))
        self.completed += 1
        return y


def routed_task(threshold: float, skips: bool = True, samples: int = 6, length: int = 5, seed: int = 1) -> BlockTask:
    """The toy block with random streams."""
    block = RoutedBlock(threshold, skips)
    generator = torch.Generator().manual_seed(seed)
    inputs, targets = (torch.randn(samples, length, SIZE, generator=generator) for _ in range(2))
    layout = Layout("routed", GROUPS, Heads(1, 1))
    return BlockTask(0, layout, block, dict.fromkeys(layout.linears, Grid(3, SIZE)), inputs, targets, {})
