# SPDX-License-Identifier: Apache-2.0
"""``OmniQuantModule``; the equations are in ``omniq.stages.omniquant``."""

from typing import Any

import torch
from torch import Tensor, nn

from omniq.calibration.fuse import block_transform, fuse, input_ranges
from omniq.calibration.reconstruction import ReconstructionModule, module_key
from omniq.calibration.second_moments import second_moments_for
from omniq.calibration.task import BlockTask
from omniq.errors import UserError
from omniq.kernels.scaled_weight import ScaledWeight, materialize
from omniq.quantizers.clipping import RangeEstimator
from omniq.quantizers.fake_quant_weight import FakeQuantWeight
from omniq.stages.omniquant import OmniQuant
from omniq.storage.block_result import BlockResult, QuantizedLinear
from omniq.transforms.let import warn_once
from omniq.transforms.transform import Transform


class OmniQuantModule(ReconstructionModule):
    """Learns clipping and transform of one block.

    Args:
        task: the block, its streams and its grids.
        settings: the settings of the stage.
    """

    settings: OmniQuant

    def __init__(self, task: BlockTask, settings: OmniQuant) -> None:
        super().__init__(task, settings)
        self.transform, self.moves = self._start_transform()  # NOTE: checkpoints hold the name ``moves``
        if self.transform is None and isinstance(settings.clipping, RangeEstimator):
            raise UserError(
                "stages: OmniQuant has nothing to learn: a scale between queries and keys has no effect while both "
                "stay at 16 bits; add norm to transform.equivalences, or give a learnable clipping, such as LWC"
            )
        second_moment = second_moments_for(settings.clipping, task, settings.token_weights)
        weights = {name: task.linear(name).weight.detach() for name in task.layout.linears}
        self.clips = nn.ModuleDict(
            {
                module_key(name): settings.clipping.build(weight, task.grids[name], second_moment.get(name))
                for name, weight in weights.items()
            }
        )
        self.to(task.device)
        if settings.augmented_loss:
            self.augment()

    def _start_transform(self) -> tuple[Transform | None, nn.ParameterDict | None]:
        """Fuse the initial values into the block; the learned transform then starts at the identity."""
        task, let = self.task, self.settings.transform
        kinds = self.settings.equivalence_kinds(task.layout, task.activations)
        if let is not None and len(kinds) < len(let.equivalences):
            warn_once("no scale between queries and keys is learned: it has no effect while both stay at 16 bits")
        if let is None or not kinds:
            return None, None
        transform = block_transform(task, kinds, let.shift)
        values = transform.initial(dict(task.block.named_parameters()), input_ranges(task), let.alpha)
        fuse(task.block, transform, transform.parameters(values).to(task.device))
        return transform, transform.parameters()

    def tensors(self) -> dict[str, Tensor]:
        """Full-precision tensors of the block after the transform; differentiable in its parameters."""
        return {name: materialize(value) for name, value in self._transformed().items()}

    def quantized_tensors(self, dtype: torch.dtype | None = None) -> dict[str, Tensor]:
        tensors = self._transformed()
        for name in self.task.layout.linears:
            out = dtype or self.task.linear(name).weight.dtype
            tensors[f"{name}.weight"] = self.clip(name)(tensors[f"{name}.weight"], out)
        return {name: materialize(value) for name, value in tensors.items()}

    def _transformed(self) -> dict[str, Tensor | ScaledWeight]:
        """As ``tensors``, with the factors of transformed weights kept separate; without a transform, weights only."""
        if self.transform is None or self.moves is None:
            return {f"{name}.weight": self.task.linear(name).weight for name in self.task.layout.linears}
        return self.transform.apply_factored(dict(self.task.block.named_parameters()), self.moves)

    def clip(self, name: str) -> FakeQuantWeight:
        """The clipping of one linear."""
        clip = self.clips[module_key(name)]
        assert isinstance(clip, FakeQuantWeight)
        return clip

    def parameter_groups(self) -> list[dict[str, Any]]:
        clips = [each for each in self.clips.parameters() if each.requires_grad]
        groups: list[dict[str, Any]] = [{"params": clips, "lr": self.settings.clipping_lr}] if clips else []
        if self.settings.transform is not None and self.moves is not None:
            groups.append({"params": list(self.moves.parameters()), "lr": self.settings.transform.lr})
        return groups

    @torch.no_grad()
    def finish(self) -> BlockResult:
        task, dtype, tensors = self.task, self.task.export_dtype, self.tensors()
        linears: dict[str, QuantizedLinear] = {}
        for name in task.layout.linears:
            weight, grid = tensors[f"{name}.weight"].float(), task.grids[name]
            scale, zero_point = self.clip(name).grid_of(weight)
            linears[name] = QuantizedLinear.of(grid, grid.quantize(weight, scale, zero_point), scale, zero_point)
        if self.transform is None or self.moves is None:
            return BlockResult(linears, task.plain_tensors())
        result = BlockResult(linears, {name: tensors[name].to(dtype) for name in task.plain_tensors()})
        if result.first_unstorable(dtype) is None:  # else the block stays unchanged for ``abandon``
            fuse(task.block, self.transform, self.moves)
        return result

    @torch.no_grad()
    def abandon(self) -> str:
        for name in self.task.layout.linears:
            self.clip(name).reset()
        for value in self.moves.parameters() if self.moves is not None else ():
            value.zero_()
        return "the initial grid" if self.moves is None else "the initial grid and transform"
