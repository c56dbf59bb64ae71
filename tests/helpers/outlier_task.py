# SPDX-License-Identifier: Apache-2.0
"""A block whose inputs have an outlier channel, and the error of the block after some stages."""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from omniq.blocks.forward import call_block
from omniq.blocks.weights import load_quantized_weights
from omniq.calibration.stage import Stage
from omniq.calibration.task import BlockTask
from omniq.grid.affine import Grid
from omniq.grid.scheme import Activations
from omniq.models.families import family_of_type
from tests.helpers.stages import fitted
from tests.helpers.tiny import tiny_block

W4A4 = Activations(4, 4, 4)

_SIZES = {"hidden_size": 32, "num_attention_heads": 2}
_OWN = {"opt": {"ffn_dim": 48, "word_embed_proj_dim": 32}}


def outlier_task(family: str = "llama", bits: int = 4, activations: Activations = W4A4, **model: Any) -> BlockTask:
    """A block on inputs with one channel of large values; ``model``: keys of the config of the family."""
    own = _OWN.get(family, {"intermediate_size": 48, "num_key_value_heads": 1})
    block, kwargs = tiny_block(family, length=12, **{**_SIZES, **own, **model})
    inputs = torch.randn(3, 12, 32, generator=torch.Generator().manual_seed(1))
    inputs[..., 3] *= 20
    with torch.no_grad():
        targets = call_block(block, inputs, kwargs)
    layout = family_of_type(family).layout(block, 0)
    grids = dict.fromkeys(layout.linears, Grid(bits, scale_dtype=torch.float32))
    return BlockTask(0, layout, block, grids, inputs, targets, kwargs, activations=activations)


def relative(found: Tensor, expected: Tensor) -> float:
    """Norm of the difference relative to the norm of ``expected``."""
    return float((found - expected).norm() / expected.norm())


def deployed_error(stages: list[Stage], task: BlockTask, folder: Path) -> float:
    """Relative error of the block's output after these stages, activations quantized."""
    for number, stage in enumerate(stages):
        (folder / str(number)).mkdir(parents=True)
        fitted(stage, task, folder / str(number))
    assert task.result is not None
    load_quantized_weights(task.block, task.result)
    with task.quantized_activations():
        return relative(task.run(task.inputs), task.targets)
