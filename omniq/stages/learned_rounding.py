# SPDX-License-Identifier: Apache-2.0
"""Learned rounding: tune codes and scales of an earlier stage together against the block's own output.

Layer-wise stages (GPTQ, QuantEase) see one linear at a time; clipping sees the whole block but rounds to nearest. This
stage starts from their result and learns each code against the output of the block, as SignRound (arXiv 2309.05516),
TesseraQ (arXiv 2410.19103) and the first phase of EfficientQAT (arXiv 2407.11062) do. With positions ``p`` on the grid,
scales ``s``, norm weights ``g`` and fixed zero points ``z``,

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
"""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, ClassVar

from omniq.calibration.settings import Reconstruction, Schedule, TokenWeights
from omniq.calibration.stage import Part, Stage
from omniq.errors import UserError

if TYPE_CHECKING:  # settings are parsed without torch
    from omniq.calibration.module import BlockModule
    from omniq.calibration.task import BlockTask


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

    def module(self, task: "BlockTask") -> "BlockModule":
        from omniq.stages.modules.learned_rounding import LearnedRoundingModule

        return LearnedRoundingModule(task, self)
