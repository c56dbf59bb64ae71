# SPDX-License-Identifier: Apache-2.0
"""SmoothQuant (arXiv 2211.10438): move part of the activations' range into the weights, then round to nearest.

    s_j = max|x_j|^alpha / max|W_j|^(1 - alpha),      x_j / s_j,  W_j s_j        for every input channel j of a norm

No gradients. Alone it is the baseline of that name; before another stage (GPTQ, QuantEase, OmniQuant) it only prepares
the block, and its codes are replaced. Where the scales come from: ``omniq.transforms.initial``.
"""

from collections.abc import Sequence

import torch

from omniq.calibration.fuse import block_transform, check_equivalences, fuse, input_ranges
from omniq.calibration.rounding import RTNModule
from omniq.calibration.stage import Part, Stage
from omniq.calibration.task import BlockTask
from omniq.grid.scheme import Activations
from omniq.models.layout import Layout
from omniq.quantizers.clipping import MinMax, RangeEstimator
from omniq.storage.block_result import BlockResult
from omniq.transforms.initial import check_alpha
from omniq.transforms.let import MEASURED_KINDS, check_kinds


class SmoothQuant(Stage):
    """Scales from maxima, no learning.

    Args:
        alpha: how much of the range moves, 0 none to 1 all.
        equivalences: where it moves: norm (the paper), value_output, up_down.
        clipping: the range of each group of weights; min-max by default.

    Raises:
        UserError: alpha outside 0..1, no equivalence, one that has no maxima to go by, or one given twice.
    """

    def __init__(
        self, alpha: float = 0.5, equivalences: Sequence[str] = ("norm",), clipping: RangeEstimator | None = None
    ) -> None:
        check_alpha(alpha)
        check_kinds(equivalences, "stages: SmoothQuant.equivalences", MEASURED_KINDS)
        self.alpha, self.equivalences, self.clipping = alpha, tuple(equivalences), clipping or MinMax()

    @property
    def leaves(self) -> frozenset[Part]:
        return frozenset({"block"})

    def check_layout(self, layout: Layout) -> None:
        check_equivalences(layout, self.equivalences, "stages: SmoothQuant.equivalences")

    def equivalence_kinds(self, layout: Layout, activations: Activations) -> Sequence[str]:
        return self.equivalences

    def module(self, task: BlockTask) -> "SmoothQuantModule":
        return SmoothQuantModule(task, self)


class SmoothQuantModule(RTNModule):
    """A block that is smoothed and rounded once."""

    def __init__(self, task: BlockTask, settings: SmoothQuant) -> None:
        super().__init__(task, settings.clipping)
        self.settings = settings

    @torch.no_grad()
    def finish(self) -> BlockResult:
        task = self.task
        transform = block_transform(task, self.settings.equivalences, shift=False)
        tensors = dict(task.block.named_parameters())
        values = transform.initial(tensors, input_ranges(task), self.settings.alpha, shift=False)
        fuse(task.block, transform, transform.parameters(values).to(task.device))
        return super().finish()
