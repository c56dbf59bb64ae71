# SPDX-License-Identifier: Apache-2.0
"""Learned rounding: tune codes and scales of an earlier stage together against the block's own output.

Layer-wise stages (GPTQ, QuantEase) see one linear at a time; clipping sees the whole block but rounds to nearest. This
stage starts from their result and learns each code against the output of the block, as SignRound (arXiv 2309.05516),
TesseraQ (arXiv 2410.19103) and the first phase of EfficientQAT (arXiv 2407.11062, section 3.2) do. With positions ``p``
on the grid, scales ``s``, norm weights ``g`` and fixed zero points ``z``,

    codes = clamp(round(p), 0, 2^b - 1),   W^ = (codes - z) s exp(u),   g^ = g exp(v)

AdamW learns ``p``, ``u`` and ``v`` with the loss of ``omniq.calibration.reconstruction``. The rounding is
straight-through:

    d p = dW^ s exp(u),    d u = sum over the group of dW^ W^

Positions are measured in grid steps, so one learning rate serves all layers and bit widths. A position starts at its
code, moved by at most 0.4 toward the full-precision weight, so a code changes only if the loss pushes it further. A
position at the end of the grid receives no gradient that points out of the grid.

With ``held_out``, a fraction of the samples is kept from learning: the fit stops early and keeps the state with the
lowest loss on them (``omniq.calibration.early_stop``).

Deviation from EfficientQAT: learning a scale does not change the codes. With ``rounding_lr`` 0, only scales and norms
are tuned. Memory: for every weight of one block, float32 values of position, start, gradient and the two moments of
AdamW, and a copy of position and moments as of the last good pass.

Shapes: ``o`` output features, ``i`` input features, ``G`` groups.
"""

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from omniq.calibration.early_stop import EarlyStopModule
from omniq.calibration.reconstruction import Reconstruction, Schedule, module_key
from omniq.calibration.stage import Part, Stage
from omniq.calibration.task import BlockTask
from omniq.calibration.token_weights import TokenWeights
from omniq.errors import UserError
from omniq.grid.affine import Grid
from omniq.storage.block_result import BlockResult, QuantizedLinear

MARGIN = 0.4  # largest initial distance of a position from its code, in grid steps


class LearnedRounding(Reconstruction):
    """Tune codes, scales and norms of the previous stage by block-wise reconstruction.

    Args:
        epochs: passes over the samples for each block.
        batch_size: samples per step and process.
        rounding_lr: AdamW learning rate of the positions, in grid steps; 0 keeps the codes.
        scale_lr: AdamW learning rate of the logarithm of the scales; 0 keeps the scales.
        norm_lr: AdamW learning rate of the logarithm of the norm weights; 0 keeps the norm weights.
        augmented_loss: add the distance to the output of the full-precision block on the quantized stream.
        schedule: ``cosine`` to decay the learning rates to zero over the block, or ``constant``.
        shuffle: draw a new order of the samples for each epoch.
        token_weights: the weight of each token in the loss.
        held_out: fraction of the samples that is kept from learning (at least one sample per process). The stage keeps
            its state with the lowest loss on them. 0 learns from all samples and keeps the last state.
        patience: passes without a lower loss on the samples of ``held_out`` after which the stage stops.

    Raises:
        UserError: a learning rate is outside 0 to 1, or all are 0; ``held_out`` or ``patience`` is out of range; see
            ``Reconstruction``.
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
        held_out: float = 0.0,
        patience: int = 3,
    ) -> None:
        super().__init__(epochs, batch_size, augmented_loss, schedule, shuffle, token_weights)
        self.held_out, self.patience = held_out, patience
        if not 0 <= held_out < 1:
            raise UserError(f"stages: LearnedRounding.held_out {held_out} is out of range: give 0 or more, below 1")
        if patience < 1:
            raise UserError(f"stages: LearnedRounding.patience {patience} is too small: give 1 or more")
        self.rates = {"rounding_lr": rounding_lr, "scale_lr": scale_lr, "norm_lr": norm_lr}
        for name, rate in self.rates.items():
            if not 0 <= rate < 1:
                raise UserError(f"stages: LearnedRounding.{name} {rate} is out of range: give 0 or more, below 1")
        if not any(self.rates.values()):
            raise UserError(
                "stages: LearnedRounding has nothing to learn because all learning rates are 0: set at least one, such "
                "as rounding_lr 0.004"
            )

    def check_place_in_list(self, before: Sequence[Stage]) -> None:
        if not before:
            raise UserError(
                "stages: LearnedRounding needs a preceding stage, whose codes it starts from: put RTN, OmniQuant, GPTQ "
                "or QuantEase first"
            )

    def kept(self, samples: int) -> int:
        """The number of samples that are kept from learning, of the ``samples`` of one process."""
        return max(1, round(self.held_out * samples)) if self.held_out else 0

    def check_samples(self, samples: int) -> None:
        if self.kept(samples) >= samples:
            raise UserError(
                f"stages: LearnedRounding.held_out {self.held_out} keeps all {samples} samples of a process from "
                "learning: lower it, or raise data.samples"
            )

    @property
    def takes(self) -> frozenset[Part]:
        return frozenset({"block", "grid", "codes", "norms"})

    @property
    def leaves(self) -> frozenset[Part]:
        return frozenset({"grid", "codes", "norms"} if self.rates["norm_lr"] else {"grid", "codes"})

    def module(self, task: BlockTask) -> "LearnedRoundingModule":
        return LearnedRoundingModule(task, self)


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
