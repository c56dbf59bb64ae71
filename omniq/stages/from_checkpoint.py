# SPDX-License-Identifier: Apache-2.0
"""FromCheckpoint: finished blocks of another run or of a quantized checkpoint, as the first stage of a list.

The stage computes nothing. It hands on codes, scales, zero points, norms and biases as they are stored, so that a stage
of the whole model can improve them:

    stages:
      - {class_path: omniq.stages.FromCheckpoint, init_args: {path: checkpoints/w4}}
      - omniq.stages.EndToEnd

``omniq tune`` writes such a list. ``omniq.run.origin`` reads the blocks. The checkpoint may come from omniq or from
another program, in any format that omniq reads and that stores integers on a uniform grid.
"""

from typing import TYPE_CHECKING

from omniq.calibration.stage import Part, Stage
from omniq.errors import UserError

if TYPE_CHECKING:  # settings are parsed without torch
    from omniq.calibration.module import BlockModule
    from omniq.calibration.task import BlockTask


class FromCheckpoint(Stage):
    """Takes every block from a finished run or a quantized checkpoint.

    Args:
        path: a run directory of omniq, or a folder with a quantized model in a format that omniq reads.

    Raises:
        UserError: the path is empty.
    """

    def __init__(self, path: str) -> None:
        if not path:
            raise UserError("stages: FromCheckpoint.path is empty: give a run directory or a quantized checkpoint")
        self.path = path

    @property
    def leaves(self) -> frozenset[Part]:
        return frozenset({"grid", "codes", "norms", "transforms"})

    def module(self, task: "BlockTask") -> "BlockModule":
        from omniq.stages.modules.from_checkpoint import FromCheckpointModule

        return FromCheckpointModule(task)
