# SPDX-License-Identifier: Apache-2.0
"""Batches of the size of the first batch become a CUDA graph; other batches run eagerly."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from omniq.calibration.captured_step import WARMUP, OptimizerStep


class Counted(OptimizerStep):
    """Notes the size of each batch and what became of it, without a GPU."""

    def __init__(self) -> None:
        super().__init__(lambda inputs, targets: inputs, SimpleNamespace())  # type: ignore[arg-type]
        self.found: list[tuple[str, int]] = []

    def _step(self, inputs: Any, targets: Any) -> Any:
        self.found.append(("eager", inputs.shape[0]))

    def _on_side_stream(self, inputs: Any, targets: Any) -> Any:
        self.found.append(("warm-up", inputs.shape[0]))

    def _capture(self, inputs: Any, targets: Any) -> None:
        size = inputs.shape[0]
        replay = SimpleNamespace(replay=lambda: self.found.append(("graph", size)))
        buffer = SimpleNamespace(shape=inputs.shape, copy_=lambda batch: None)
        self._graph, self._buffers = replay, (buffer, buffer)  # type: ignore[assignment]
        self._result = torch.zeros(())


def batch(size: int) -> Any:
    return SimpleNamespace(is_cuda=True, shape=torch.Size((size, 8, 4)))


@pytest.mark.parametrize("position", range(1, 6))
def test_captured_step_smaller_batch_runs_eagerly(position: int) -> None:
    """The smaller last batch of a pass comes at each position, also at the one of the capture."""
    step = Counted()
    for turn in range(3):
        for number in range(position + 1):
            step(batch(1 if number == position else 3), batch(3))
        assert step.found[-1] == ("eager", 1), turn
    full = [what for what, size in step.found if size == 3]
    assert full == ["warm-up"] * WARMUP + ["graph"] * (len(full) - WARMUP)
    step.reset()
    step(batch(2), batch(2))
    assert step.found[-1] == ("warm-up", 2)


@pytest.mark.gpu
def test_captured_step_with_smaller_batches_equals_eager() -> None:
    inputs = torch.randn(4, 3, 8, generator=torch.Generator().manual_seed(0)).cuda()
    found: list[Tensor] = []
    for graph in (False, True):
        weight = nn.Parameter(torch.ones(8, device="cuda"))
        rate = torch.tensor(0.1, device="cuda")
        optimizer = torch.optim.AdamW([weight], lr=rate, weight_decay=0.0, fused=True, capturable=True)
        step = OptimizerStep(lambda x, y, w=weight: (x * w - y).square().mean(), optimizer, graph=graph)  # type: ignore[misc]
        for turn in range(12):
            part = inputs[turn % 4][: 1 if turn % 4 == 3 else 3]  # the fourth would be the capture
            step(part, part * 2)
        found.append(weight.detach())
        assert (step._graph is not None) == graph
    torch.testing.assert_close(*found)
