# SPDX-License-Identifier: Apache-2.0
"""An exported checkpoint in its runtime, where the machine has the packages and the memory for it."""

from functools import cached_property
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel

from omniq.export.containers.container import Container


class ReopenedCheckpoint:
    """A checkpoint that is opened when its model is first asked for, once, and only if this machine can open it.

    Args:
        path: the folder.
        container: how it is laid out.
        codec: that of its linears.
    """

    def __init__(self, path: Path, container: Container[Any], codec: Any) -> None:
        self.path, self._container, self._codec = path, container, codec

    @cached_property
    def model(self) -> PreTrainedModel | None:
        """As the runtime opens it; None if this machine lacks something for that."""
        return self._container.open(self.path) if self.lacking is None else None

    @cached_property
    def lacking(self) -> str | None:
        """What this machine lacks to open it, with the remedy; None if it lacks nothing."""
        return self._container.lacks(self._codec, self.path)
