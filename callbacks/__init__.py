# SPDX-License-Identifier: Apache-2.0
"""Lightning callbacks of a block's fit; imported as ``omniq.callbacks``."""

from omniq.callbacks.checkpoint import AtomicCheckpointIO, PassCheckpoint
from omniq.callbacks.fuse import Fuse
from omniq.callbacks.guard import NonFiniteGuard
from omniq.callbacks.losses import BlockLosses
from omniq.callbacks.progress import BlockProgress
from omniq.callbacks.settle import Settle

__all__ = ["AtomicCheckpointIO", "BlockLosses", "BlockProgress", "Fuse", "NonFiniteGuard", "PassCheckpoint", "Settle"]
