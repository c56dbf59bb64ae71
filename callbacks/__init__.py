# SPDX-License-Identifier: Apache-2.0
"""Lightning callbacks of a block's fit; imported as ``omniq.callbacks``.

``NonFiniteGuard`` is public: a run has one by default, and an entry of ``callbacks`` in YAML replaces it, for example
to set ``tries`` or ``factor``. The others (``BlockLosses``, ``BlockProgress``, ``Fuse``, ``PassCheckpoint``,
``Settle``, ``AtomicCheckpointIO``) are internal parts of ``omniq.run.fit``, which adds each of them to every fit; a run
refuses them in ``callbacks``. Each class is imported on first use.
"""

from typing import TYPE_CHECKING

from omniq.lazy import lazy_names

if TYPE_CHECKING:
    from omniq.callbacks.checkpoint import AtomicCheckpointIO, PassCheckpoint
    from omniq.callbacks.fuse import Fuse
    from omniq.callbacks.guard import NonFiniteGuard
    from omniq.callbacks.losses import BlockLosses
    from omniq.callbacks.progress import BlockProgress
    from omniq.callbacks.settle import Settle
else:  # hidden from type checkers, for which a module-level __getattr__ defines every name
    __getattr__ = lazy_names(
        __name__,
        {
            "AtomicCheckpointIO": "omniq.callbacks.checkpoint",
            "BlockLosses": "omniq.callbacks.losses",
            "BlockProgress": "omniq.callbacks.progress",
            "Fuse": "omniq.callbacks.fuse",
            "NonFiniteGuard": "omniq.callbacks.guard",
            "PassCheckpoint": "omniq.callbacks.checkpoint",
            "Settle": "omniq.callbacks.settle",
        },
    )

__all__ = ["AtomicCheckpointIO", "BlockLosses", "BlockProgress", "Fuse", "NonFiniteGuard", "PassCheckpoint", "Settle"]
