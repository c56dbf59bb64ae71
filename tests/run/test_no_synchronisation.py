# SPDX-License-Identifier: Apache-2.0
"""Inside an epoch the host only launches work; it waits for the GPU at the end of a pass only."""

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import Callback

from omniq.calibration.captured_step import WARMUP
from omniq.calibration.module import BlockModule
from omniq.config.parse import parse_run
from omniq.run import loop
from omniq.stages.modules.omniquant import OmniQuantModule
from tests.helpers.runs import QUICK, SMALL, configuration, omniquant, write_run

SAMPLES = 12


class Alarm(Callback):
    """Makes every wait for the GPU an error: from a step after the capture to the one that ends the pass, and so on.

    That is everything in between: the step, the loader, Lightning's loops, and all callbacks of a run.

    Args:
        graph: let the step become a CUDA graph.
        watched: gets the index of the block for each step that was.
    """

    def __init__(self, graph: bool, watched: list[int]) -> None:
        self.graph, self.watched = graph, watched

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        assert isinstance(pl_module, OmniQuantModule)
        pl_module.step.enabled = self.graph

    def on_train_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: torch.Tensor, batch_idx: int
    ) -> None:
        assert isinstance(pl_module, BlockModule)
        on = batch_idx > WARMUP + 1 and not pl_module.batches.ends_pass(batch_idx + 1)
        torch.cuda.set_sync_debug_mode("error" if on else "default")
        self.watched += [pl_module.task.index] if on else []


@pytest.fixture(autouse=True)
def quiet_again() -> Iterator[None]:
    yield
    if torch.cuda.is_available():
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.gpu
def test_sync_debug_mode_makes_wait_an_error() -> None:
    value = torch.ones(1, device="cuda")
    torch.cuda.set_sync_debug_mode("error")
    with pytest.raises(RuntimeError, match="synchronizing CUDA operation"):
        value.item()


@pytest.mark.gpu
@pytest.mark.parametrize("streams", ["device", "host"])
@pytest.mark.parametrize("graph", [True, False])
def test_training_step_does_not_wait_for_gpu(tmp_path: Path, streams: str, graph: bool) -> None:
    """4-bit weights and activations, clipping, transform, two targets, a decaying rate, and scaled gradients."""
    sections = {
        "scheme": {"name": "W4A4KV4", "queries": True},
        "stages": [omniquant(transform={"alpha": 0.5}, augmented_loss=True, schedule="cosine")],
        "trainer": {"accelerator": "gpu", "devices": 1, "precision": "16-mixed"},
        "streams": streams,
        **QUICK,
    }
    write_run(tmp_path, model=SMALL)
    given = configuration(tmp_path, **sections)
    given["data"] |= {"samples": SAMPLES, "held_out": 0}
    run, settings = parse_run(settings=given)
    watched: list[int] = []
    loop.quantize(replace(run, callbacks=[lambda: Alarm(graph, watched)]), settings)
    each_block = 2 * (SAMPLES - 1) - WARMUP - 2  # two passes less their last steps, and what came before
    assert watched == [0] * each_block + [1] * each_block
