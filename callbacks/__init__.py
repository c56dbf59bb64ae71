# SPDX-License-Identifier: Apache-2.0
"""Lightning callbacks of a block's fit; imported as ``omniq.callbacks``.

``NonFiniteGuard`` is public: a run has one by default, and an entry of ``callbacks`` in YAML replaces it, for example
to set ``tries`` or ``factor``. The others (``BlockLosses``, ``BlockProgress``, ``Fuse``, ``PassCheckpoint``,
``Settle``, ``AtomicCheckpointIO``) are internal parts of ``omniq.run.fit``, which adds each of them to every fit; a run
refuses them in ``callbacks``.
"""

from omniq.callbacks.guard import NonFiniteGuard

__all__ = ["NonFiniteGuard"]
