# SPDX-License-Identifier: Apache-2.0
"""An exported checkpoint opened in its runtime, if the machine has the packages and the memory for it."""

from functools import cached_property
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel

from omniq.export.containers.container import Container


class ReopenedCheckpoint:
    """A checkpoint that is opened once, on first access of its model, and only if this machine can open it.

    Args:
        path: the folder.
        container: the container of the checkpoint.
        codec: the codec of its linears.
    """

    def __init__(self, path: Path, container: Container[Any], codec: Any) -> None:
        self.path, self._container, self._codec = path, container, codec

    @cached_property
    def model(self) -> PreTrainedModel | None:
        """The model as the runtime opens it; None if this machine cannot open it."""
        return self._container.open(self.path) if self.lacking is None else None

    @cached_property
    def lacking(self) -> str | None:
        """The requirement that this machine lacks, with the remedy; None if it can open the checkpoint."""
        return self._container.lacks(self._codec, self.path)
