# SPDX-License-Identifier: Apache-2.0
"""AWQ (arXiv 2306.00978): scale up weights of inputs with large activations, search the clipping, round to nearest.

For linears ``W`` that read one input ``x``, with the scale folded into the module that makes this input (equations 4
and 5):

    s(alpha) = a^alpha / sqrt(max a^alpha * min a^alpha),   a_j = mean |x_j|
    alpha    = argmin over a grid of 0..1 of || Q(W diag(s)) diag(s)^-1 X - W X ||^2

A larger ``s_j`` reduces the rounding error of column ``j`` in proportion, as long as it does not widen the range of its
group. ``alpha = 0`` is plain rounding, so the search never increases the error of an input.

1. One pass of the quantized stream through the block gathers ``a`` and ``S = mean x x^T`` of each input.
2. Each ``alpha`` of the grid is one step of the fit. With ``W^ = Q(W diag(s)) diag(s)^-1``, its error is
   ``tr((W - W^) S (W - W^)^T)``. This is exactly the mean square error of the output, so no sample runs again. Each
   step logs the best error so far, relative to the power of the output, as
   ``block/007/input_layernorm/recon_error``, and the best alpha as ``.../alpha``.
3. ``fuse`` folds the scales into the block, as for every transform. The inputs are independent: dividing rows of a
   linear changes none of its codes. Therefore the order of the folds does not matter, and one pass is enough.
4. The clip search. The published search tries shrunken ranges and takes the one with the least output error of each
   group of weights. This is ``Searched`` with the weighting ``gram``, which shrinks both ends independently. Then the
   weights are rounded to nearest.

The block stays equivalent and in full precision, so GPTQ, QuantEase or OmniQuant can follow; their codes replace those
of AWQ.

Scales are placed after norms, from values to output, and in gated MLPs from up to down. With grouped-query attention,
values to output has one scale for each KV channel, from the mean over its readers; the published code omits this case.

Deviations from the published code: the error is that of the linears that read an input (equation 4), where the
published code compares outputs of the whole attention or MLP. The error is measured on the quantized stream. The grid
of alpha includes both ends. Queries and keys are clipped, too. The search and the fold are done in float32.

The search measures the effect of rounding weights, not of rounding activations. A scheme with activation bits is
accepted, but its scales are not optimised for them; ``OutlierSuppression`` searches on quantized inputs.
"""

from collections.abc import Sequence
from typing import TYPE_CHECKING

from omniq.calibration.settings import check_equivalences, kinds_of
from omniq.calibration.stage import Part, Stage
from omniq.errors import UserError
from omniq.quantizers.clipping import RangeEstimator, Searched
from omniq.transforms.let import MEASURED_KINDS, check_kinds

if TYPE_CHECKING:  # settings are parsed without torch
    from omniq.calibration.module import BlockModule
    from omniq.calibration.task import BlockTask
    from omniq.grid.scheme import Activations
    from omniq.models.layout import Layout


class AWQ(Stage):
    """Searched scales and clipping, without learning.

    Args:
        candidates: number of values of alpha to try, evenly spaced from 0 to 1 (20 in the paper).
        equivalences: where to place scales: ``norm``, ``value_output``, ``up_down``; by default all that the family
            has.
        clipping: how to choose the range of each group after scaling; by default searched for the least output error
            (weighting ``gram``). Use weighting ``diagonal`` if a later stage refines the codes; ``MinMax`` skips the
            clip search.

    Raises:
        UserError: ``candidates`` is less than 2, or ``equivalences`` is empty, repeats a kind, or has a kind that
            changes no codes.
    """

    def __init__(
        self, candidates: int = 20, equivalences: Sequence[str] | None = None, clipping: RangeEstimator | None = None
    ) -> None:
        if candidates < 2:
            raise UserError(
                f"stages: AWQ.candidates {candidates} is too small: give 2 or more, such as 20; the first is alpha = 0"
            )
        if equivalences is not None:
            check_kinds(equivalences, "stages: AWQ.equivalences", MEASURED_KINDS)
        self.candidates, self.equivalences = candidates, equivalences
        self.clipping = clipping or Searched("gram")

    @property
    def leaves(self) -> frozenset[Part]:
        return frozenset({"block"})

    def check_layout(self, layout: "Layout") -> None:
        check_equivalences(layout, self.kinds(layout) or MEASURED_KINDS[:1], "stages: AWQ.equivalences")

    def kinds(self, layout: "Layout") -> list[str]:
        """The kinds of equivalences to use in this family."""
        available = [kind for kind in kinds_of(layout) if kind in MEASURED_KINDS]
        return available if self.equivalences is None else list(self.equivalences)

    def equivalence_kinds(self, layout: "Layout", activations: "Activations") -> Sequence[str]:
        return self.kinds(layout)

    def module(self, task: "BlockTask") -> "BlockModule":
        from omniq.stages.modules.awq import AWQModule

        return AWQModule(task, self)
