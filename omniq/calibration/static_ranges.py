# SPDX-License-Identifier: Apache-2.0
"""Fixed ranges for the inputs of a finished block's linears, for schemes with ``activation_range: tensor``.

The ranges are measured after all stages of the block, because a transform changes ranges with every step, and a later
stage changes the weights in front of the inner linears. One pass runs the block with its quantized weights on the
calibration samples of the quantized stream. The smallest and largest value of each input, over the samples of all
processes, define its range. Activations are not quantized in that pass, so that the range of one input does not depend
on how another one is clipped.

While the block is calibrated, these ranges do not exist yet; see ``omniq.quantizers.activations.quantize_samples``.
"""

from omniq.blocks.weights import load_quantized_weights
from omniq.calibration.fuse import input_ranges
from omniq.calibration.task import BlockTask
from omniq.distributed.collectives import error_on_rank0
from omniq.quantizers.activations import StaticGrid
from omniq.storage.block_result import BlockResult


def calibrate_static_ranges(task: BlockTask, result: BlockResult) -> BlockResult:
    """Add the grid of each linear's input to a finished block; leaves its quantized weights in ``task.block``.

    Raises:
        UserError: no token reaches a linear; see ``Observation.results``.
    """
    load_quantized_weights(task.block, result)
    ranges, given, dtype = input_ranges(task), task.activations, task.export_dtype
    if unreached := [name for name in result.linears if name not in ranges.lo]:
        raise error_on_rank0(
            f"{task.name} {unreached[0]}: no calibration token reaches this linear, so its input has no range: set "
            "scheme.activation_range to token, or give more calibration text (data.samples)"
        )
    return result.with_inputs(
        {
            name: StaticGrid.fit(ranges.lo[name].min(), ranges.hi[name].max(), given.inputs, given.symmetric, dtype)
            for name in result.linears
        }
    )
