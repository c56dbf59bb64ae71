# SPDX-License-Identifier: Apache-2.0
"""Shared by the tests of mixed grids: a tiny block with several grids and a linear in floating point."""

from dataclasses import replace

import torch

from omniq.calibration.task import BlockTask
from omniq.grid.affine import Grid
from tests.helpers.stages import tiny_task

NARROW = Grid(3, 16, scale_dtype=torch.float32)
WIDE = Grid(8, 16, scale_dtype=torch.float32)
CHANNEL = Grid(4, symmetric=True, scale_dtype=torch.float32)
MIXED = {
    "self_attn.q_proj": NARROW,
    "self_attn.k_proj": WIDE,
    "self_attn.v_proj": NARROW,
    "self_attn.o_proj": CHANNEL,
    "mlp.gate_proj": CHANNEL,
    "mlp.down_proj": WIDE,
}
KEPT = "mlp.up_proj"


def mixed_task(samples: int = 6) -> BlockTask:
    """A block whose queries and keys have different grids, and whose up projection stays in floating point."""
    task = tiny_task(NARROW, samples)
    return replace(task, layout=task.layout.keep((KEPT,), "a rule"), grids=MIXED)
