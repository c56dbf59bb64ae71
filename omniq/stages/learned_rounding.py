# SPDX-License-Identifier: Apache-2.0
"""Learned rounding: codes and scales of an earlier stage, tuned together against the block's own output.

Layer-wise stages (GPTQ, QuantEase) see one linear at a time; clipping sees the whole block but rounds to nearest. This
stage starts where they end and lets the block decide about each code, as SignRound (arXiv 2309.05516), TesseraQ (arXiv
2410.19103) and the first phase of EfficientQAT (arXiv 2407.11062) do. With positions ``p`` on the grid, scales ``s``,
norm weights ``g`` and zero points ``z`` (which stay),

    codes = clamp(round(p), 0, 2^b - 1),   W^ = (codes - z) s exp(u),   g^ = g exp(v)

``p``, ``u`` and ``v`` are learned by AdamW; the rounding is straight-through:

    d p = dW^ s exp(u),    d u = sum over the group of dW^ W^

A position is learned in steps of the grid, so that one rate serves all layers and bits, and starts at its code, moved
toward where the full-precision weight lies by at most 0.4: a code only changes after the loss has pushed it that far.
A position at the end of the grid takes no gradient that leads out of it.

Scales do not move codes here (in EfficientQAT they do). With ``rounding_lr`` 0 only scales and norms are tuned.
Memory: position, its start, gradient and AdamW's two moments of every weight of one block, in float32; and once more
position and moments, as they were after the last good pass.

Shapes: ``o`` output features, ``i`` input features, ``G`` groups.
"""

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from omniq.calibration.reconstruction import Reconstruction, ReconstructionModule, Schedule, module_key
from omniq.calibration.stage import Part, Stage
from omniq.calibration.task import BlockTask
from omniq.calibration.token_weights import TokenWeights
from omniq.errors import UserError
from omniq.grid.affine import Grid
from omniq.storage.block_result import BlockResult, QuantizedLinear

MARGIN = 0.4  # of a step: how far from its code a position may start


class LearnedRounding(Reconstruction):
    """Codes, scales and norms by block-wise reconstruction, from those of the stage before.

    Args:
        epochs: passes over the samples for each block.
        batch_size: samples a step; of several processes, of each.
        rounding_lr: AdamW rate of the positions, in steps of the grid; 0 keeps the codes.
        scale_lr: AdamW rate of the logarithm of scales; 0 keeps the scales.
        norm_lr: AdamW rate of the logarithm of norm weights; 0 keeps them.
        augmented_loss: add the distance to the full-precision block on the quantized stream.
        schedule: ``cosine`` decays the rates to zero over the block, ``constant`` does not.
        shuffle: draw a new order of samples each epoch.
        token_weights: how much each token counts in the loss.

    Raises:
        UserError: a rate outside 0 to 1, or nothing to learn; see ``Reconstruction``.
    """

    settings_that_omit: ClassVar[Mapping[Part, str]] = {"norms": "norm_lr 0"}

    def __init__(
        self,
        epochs: int = 10,
        batch_size: int = 1,
        rounding_lr: float = 4e-3,
        scale_lr: float = 1e-3,
        norm_lr: float = 0.0,
        augmented_loss: bool = False,
        schedule: Schedule = "cosine",
        shuffle: bool = True,
        token_weights: TokenWeights = "uniform",
    ) -> None:
        super().__init__(epochs, batch_size, augmented_loss, schedule, shuffle, token_weights)
        self.rates = {"rounding_lr": rounding_lr, "scale_lr": scale_lr, "norm_lr": norm_lr}
        for name, rate in self.rates.items():
            if not 0 <= rate < 1:
                raise UserError(f"stages: LearnedRounding.{name} {rate} is no usable rate: give 0 to less than 1")
        if not any(self.rates.values()):
            raise UserError("stages: LearnedRounding has nothing to learn with all rates 0: give one, such as 0.001")

    def check_place_in_list(self, before: Sequence[Stage]) -> None:
        if not before:
            raise UserError(
                "stages: LearnedRounding starts from the codes of the stage before it, and there is none: put RTN, "
                "OmniQuant, GPTQ or QuantEase first"
            )

    @property
    def takes(self) -> frozenset[Part]:
        return frozenset({"block", "grid", "codes", "norms"})

    @property
    def leaves(self) -> frozenset[Part]:
        return frozenset({"grid", "codes", "norms"} if self.rates["norm_lr"] else {"grid", "codes"})

    def module(self, task: BlockTask) -> "LearnedRoundingModule":
        return LearnedRoundingModule(task, self)


class LearnedRoundingModule(ReconstructionModule):
    """A block whose codes, scales and norms are being learned."""

    settings: LearnedRounding

    def __init__(self, task: BlockTask, settings: LearnedRounding) -> None:
        super().__init__(task, settings)
        if task.result is None:
            raise RuntimeError(f"{task.name}: no codes to start from")
        self.start = task.result
        self.weights = nn.ModuleDict()
        for name, linear in self.start.linears.items():
            self.weights[module_key(name)] = LearnedCodes(task.linear(name).weight.detach().float(), linear)
        # On the device once and for all: a CUDA graph cannot fetch what a resumed run has read from disk.
        self._plain = {name: value.to(task.device, torch.float32) for name, value in self.start.tensors.items()}
        kept = {f"{name}.weight" for name in task.layout.kept}
        norms = {name: value for name, value in self._plain.items() if name.endswith(".weight") and name not in kept}
        self.norms = nn.ParameterDict({module_key(name): torch.zeros_like(value) for name, value in norms.items()})
        for rate, parts in self._parts().items():
            for part in parts:  # before DDP looks for parameters that get gradients
                part.requires_grad_(settings.rates[rate] > 0)
        self.to(task.device)
        if settings.augmented_loss:
            self.augment()

    def codes(self, name: str) -> "LearnedCodes":
        """What is learned about one linear."""
        weight = self.weights[module_key(name)]
        assert isinstance(weight, LearnedCodes)
        return weight

    def plain_tensors(self) -> dict[str, Tensor]:
        """Norms and biases by name, float32; differentiable in what is learned."""
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
        """What could be learned, by the name of its rate."""
        each = [self.codes(name) for name in self.start.linears]
        return {
            "rounding_lr": [codes.position for codes in each],
            "scale_lr": [codes.log_scale for codes in each],
            "norm_lr": list(self.norms.values()),
        }

    def learned(self) -> list[dict[str, Any]]:
        return [
            {"params": parts, "lr": rate}
            for name, parts in self._parts().items()
            if (rate := self.settings.rates[name])
        ]

    @torch.no_grad()
    def finish(self) -> BlockResult:
        linears = {name: self.codes(name).linear() for name in self.start.linears}
        stored = {name: value.dtype for name, value in self.start.tensors.items()}
        return BlockResult(linears, {name: x.to(stored[name]) for name, x in self.plain_tensors().items()})

    @torch.no_grad()
    def abandon(self) -> str:
        for name in self.start.linears:
            self.codes(name).reset()
        for value in self.norms.values():
            value.zero_()
        return "the codes of the stage before"


class LearnedCodes(nn.Module):
    """Codes and scales of one linear.

    Args:
        weight: in full precision, float32 ``[o, i]``.
        start: its codes and grid.
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
        """The weight, float32 ``[o, i]``."""
        codes = _Round.apply(self.position, self.grid.max_code)
        return self.grid.dequantize(codes, self.scale * self.log_scale.exp(), self.zero_point)

    def linear(self) -> QuantizedLinear:
        """As stored."""
        codes = _Round.apply(self.position, self.grid.max_code)
        scale = self.grid.store(self.scale * self.log_scale.exp())
        return QuantizedLinear.of(self.grid, codes, scale, self.zero_point)

    def reset(self) -> None:
        """Back to the start."""
        self.position.copy_(self.first)
        self.log_scale.zero_()


class _Round(torch.autograd.Function):
    """Codes of positions; straight-through, except for what leads out of the grid."""

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
