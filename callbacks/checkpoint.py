# SPDX-License-Identifier: Apache-2.0
"""Save the block in progress at the end of each pass over the data, so that a kill loses at most one pass."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import lightning as L
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.plugins.io import TorchCheckpointIO
from typing_extensions import override

from omniq.calibration.pass_module import PassModule
from omniq.distributed import collectives
from omniq.report.stopwatch import Stopwatch
from omniq.storage.sealed import NO_OWNER, Owner, load_state, save_state


class AtomicCheckpointIO(TorchCheckpointIO):
    """Write checkpoints atomically and sealed by a checksum.

    Lightning's own writer moves files from a temporary folder. If that folder is on another filesystem, the move is a
    copy and not an atomic rename.

    Args:
        owner: the run and the path that the seal covers besides the checkpoint (``omniq.storage.sealed.Owner``).
    """

    def __init__(self, owner: Owner = NO_OWNER) -> None:
        super().__init__()
        self._owner = owner

    @override
    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any | None = None) -> None:
        save_state(Path(path), checkpoint, self._owner)

    @override
    def load_checkpoint(self, path: Any, map_location: Any = "cpu", weights_only: bool | None = None) -> dict[str, Any]:
        state: dict[str, Any] = load_state(Path(path), map_location or "cpu", self._owner)
        return state


class PassCheckpoint(Callback):
    """Write one checkpoint and replace it at the end of each pass except the last, after which the block is finished.

    Args:
        path: the file of the checkpoint.
        clock: the stopwatch of the block. A resumed fit continues from the saved time.
    """

    def __init__(self, path: Path, clock: Stopwatch) -> None:
        self.path, self.clock = path, clock

    @override
    def state_dict(self) -> dict[str, Any]:
        return {"processes": collectives.world_size(), "seconds": self.clock.seconds}

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.clock.continue_from(state_dict.get("seconds", 0.0))  # checkpoints of earlier versions lack this key

    def has_same_processes(self, checkpoint: Mapping[str, Any]) -> bool:
        """Return whether the checkpoint was saved by as many processes, so that a pass has the same number of steps."""
        saved: int = checkpoint["callbacks"][self.state_key]["processes"]
        return saved == collectives.world_size()

    @override
    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        assert isinstance(pl_module, PassModule)
        step, total = batch_idx + 1, trainer.num_training_batches
        if step < total and pl_module.pausing and not trainer.should_stop:
            trainer.save_checkpoint(self.path, weights_only=False)
