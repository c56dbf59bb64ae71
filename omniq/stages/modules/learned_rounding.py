# SPDX-License-Identifier: Apache-2.0
"""``LearnedRoundingModule``; the equations are in ``omniq.stages.learned_rounding``.

Shapes: ``o`` output features, ``i`` input features, ``G`` groups.
"""

from typing import Any

import torch
from torch import Tensor, nn

from omniq.calibration.early_stop import EarlyStopModule
from omniq.calibration.reconstruction import module_key
from omniq.calibration.task import BlockTask
from omniq.grid.affine import Grid
from omniq.stages.learned_rounding import LearnedRounding
from omniq.storage.block_result import BlockResult, QuantizedLinear

MARGIN = 0.4  # largest initial distance of a position from its code, in grid steps


class LearnedRoundingModule(EarlyStopModule):
    """Learns codes, scales and norms of one block."""

    settings: LearnedRounding

    def __init__(self, task: BlockTask, settings: LearnedRounding) -> None:
        super().__init__(task, settings, settings.kept(len(task.inputs)), settings.patience)
        if task.result is None:
            raise RuntimeError(f"{task.name}: the stage has no codes to start from")
        self.start = task.result
        self.weights = nn.ModuleDict()
        for name, linear in self.start.linears.items():
            self.weights[module_key(name)] = LearnedCodes(task.linear(name).weight.detach().float(), linear)
        # Moved to the device here, because a resumed run reads them to the host and a CUDA graph cannot copy them.
        self._plain = {name: value.to(task.device, torch.float32) for name, value in self.start.tensors.items()}
        kept = {f"{name}.weight" for name in task.layout.kept}
        norms = {name: value for name, value in self._plain.items() if name.endswith(".weight") and name not in kept}
        self.norms = nn.ParameterDict({module_key(name): torch.zeros_like(value) for name, value in norms.items()})
        for rate, parts in self._parts().items():
            for part in parts:  # before DDP collects the parameters with gradients
                part.requires_grad_(settings.rates[rate] > 0)
        self.to(task.device)
        if settings.augmented_loss:
            self.augment()

    def codes(self, name: str) -> "LearnedCodes":
        """The learned codes and scales of one linear."""
        weight = self.weights[module_key(name)]
        assert isinstance(weight, LearnedCodes)
        return weight

    def plain_tensors(self) -> dict[str, Tensor]:
        """Norms and biases by name, float32; differentiable in the learned norm factors."""
        keys = {name: module_key(name) for name in self._plain}
        return {
            name: value * self.norms[keys[name]].exp() if keys[name] in self.norms else value
            for name, value in self._plain.items()
        }

    def quantized_tensors(self, dtype: torch.dtype | None = None) -> dict[str, Tensor]:
        parameters = dict(self.task.block.named_parameters())
        tensors = {name: value.to(parameters[name]) for name, value in self.plain_tensors().items()}
        for name in self.start.linears:
            out = dtype or self.task.linear(name).weight.dtype
            tensors[f"{name}.weight"] = self.codes(name)().to(out)
        return tensors

    def _parts(self) -> dict[str, list[nn.Parameter]]:
        """All learnable parameters, by the name of their learning rate."""
        each = [self.codes(name) for name in self.start.linears]
        return {
            "rounding_lr": [codes.position for codes in each],
            "scale_lr": [codes.log_scale for codes in each],
            "norm_lr": list(self.norms.values()),
        }

    def parameter_groups(self) -> list[dict[str, Any]]:
        return [
            {"params": parts, "lr": rate}
            for name, parts in self._parts().items()
            if (rate := self.settings.rates[name])
        ]

    def learned_state(self) -> dict[str, Tensor]:
        state = super().learned_state()
        codes = {name for name in state if name.endswith(".position")}  # as codes they need a quarter of the memory
        return {name: x.round().clamp(0, 255).byte() if name in codes else x for name, x in state.items()}

    @torch.no_grad()
    def finish(self) -> BlockResult:
        self.restore_best()
        linears = {name: self.codes(name).linear() for name in self.start.linears}
        stored = {name: value.dtype for name, value in self.start.tensors.items()}
        return BlockResult(linears, {name: x.to(stored[name]) for name, x in self.plain_tensors().items()})

    @torch.no_grad()
    def abandon(self) -> str:
        self.best = {}
        for name in self.start.linears:
            self.codes(name).reset()
        for value in self.norms.values():
            value.zero_()
        return "the codes of the stage before"


class LearnedCodes(nn.Module):
    """Codes and scales of one linear.

    Args:
        weight: the full-precision weight, float32 ``[o, i]``.
        start: its initial codes, scales and zero points.
    """

    first: Tensor
    scale: Tensor
    zero_point: Tensor

    def __init__(self, weight: Tensor, start: QuantizedLinear) -> None:
        super().__init__()
        self.grid: Grid = start.grid
        self.register_buffer("scale", start.scale.to(weight), persistent=False)  # [o, G]
        self.register_buffer("zero_point", start.zero_point.to(weight), persistent=False)  # [o, G]
        codes = start.codes.to(weight)
        scale, zero_point = (self.grid.expand(part, weight.shape[1]) for part in (self.scale, self.zero_point))
        first = codes + (weight / scale + zero_point - codes).clamp(-MARGIN, MARGIN)
        self.register_buffer("first", first, persistent=False)
        self.position = nn.Parameter(self.first.clone())
        self.log_scale = nn.Parameter(torch.zeros_like(self.scale))

    def forward(self) -> Tensor:
        """The quantized weight, float32 ``[o, i]``."""
        codes = _Round.apply(self.position, self.grid.max_code)
        return self.grid.dequantize(codes, self.scale * self.log_scale.exp(), self.zero_point)

    def linear(self) -> QuantizedLinear:
        """The linear as stored, with codes and storage-rounded scales."""
        codes = _Round.apply(self.position, self.grid.max_code)
        scale = self.grid.store(self.scale * self.log_scale.exp())
        return QuantizedLinear.of(self.grid, codes, scale, self.zero_point)

    def reset(self) -> None:
        """Restore the initial codes and scales."""
        self.position.copy_(self.first)
        self.log_scale.zero_()


class _Round(torch.autograd.Function):
    """Round positions to codes; straight-through, but without gradients that point out of the grid."""

    @staticmethod
    def forward(ctx: Any, position: Tensor, max_code: int) -> Tensor:
        ctx.save_for_backward(position)
        ctx.max_code = max_code
        return position.round().clamp_(0, max_code)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        (position,) = ctx.saved_tensors
        out = ((position <= 0) & (grad > 0)) | ((position >= ctx.max_code) & (grad < 0))
        return grad.masked_fill(out, 0), None
