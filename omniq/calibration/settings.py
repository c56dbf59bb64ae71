# SPDX-License-Identifier: Apache-2.0
"""Settings that several stages share, and the check of equivalences; this module does not import torch.

``Reconstruction`` is the base of stages that learn by gradient (``omniq.calibration.reconstruction``), ``GramStage`` of
stages that work layer by layer (``omniq.calibration.gram``).
"""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Literal

from omniq.calibration.stage import Part, Stage
from omniq.errors import UserError
from omniq.quantizers.clipping import RangeEstimator, Searched
from omniq.transforms.let import KINDS

if TYPE_CHECKING:
    from omniq.models.layout import Layout

Memory = Literal["auto", "model", "block"]
Schedule = Literal["constant", "cosine"]
TokenWeights = Literal["uniform", "relative"]
"""The weight of each token in the objective of a stage: ``omniq.calibration.token_weights``."""


class Reconstruction(Stage):
    """Settings that all stages with gradients share.

    Args:
        epochs: passes over the samples for each block.
        batch_size: samples per step and process.
        augmented_loss: add the distance to the output of the full-precision block on the quantized stream.
        schedule: ``constant``, or ``cosine`` to decay the learning rate to zero over the block.
        shuffle: draw a new order of the samples for each epoch.
        token_weights: the weight of each token in the loss.

    Raises:
        UserError: ``epochs`` or ``batch_size`` is less than 1.
    """

    def __init__(
        self,
        epochs: int,
        batch_size: int,
        augmented_loss: bool,
        schedule: Schedule,
        shuffle: bool,
        token_weights: TokenWeights,
    ) -> None:
        for name, value in (("epochs", epochs), ("batch_size", batch_size)):
            if value < 1:
                raise UserError(f"stages: {type(self).__name__}.{name} {value} is too small: give 1 or more")
        self.epochs, self.batch_size = epochs, batch_size
        self.augmented_loss, self.schedule, self.shuffle = augmented_loss, schedule, shuffle
        self.token_weights: TokenWeights = token_weights


class GramStage(Stage):
    """Settings that all layer-wise stages share.

    Args:
        clipping: how to choose the range of each group; ``Searched``, weighted with the diagonal of S, by default.
        true_sequential: gather the inputs of a group of linears after the earlier groups have been quantized.
        batch_size: samples per gathering step.
        token_weights: the weight of each token in S.
        damping: the fraction of the mean diagonal of S that the solver adds to the diagonal.

    Raises:
        UserError: ``batch_size`` is less than 1, or ``damping`` is outside 0 to 1.
    """

    def __init__(
        self,
        clipping: RangeEstimator | None = None,
        true_sequential: bool = True,
        batch_size: int = 4,
        token_weights: TokenWeights = "uniform",
        damping: float = 0.01,
    ) -> None:
        name = type(self).__name__
        if batch_size < 1:
            raise UserError(f"batch_size {batch_size} of {name} is too small: give 1 or more")
        if not 0 <= damping < 1:
            raise UserError(
                f"damping {damping} of {name} is outside 0 to 1: give a fraction of the mean diagonal, such as 0.01"
            )
        self.clipping = clipping or Searched()
        self.true_sequential, self.batch_size = true_sequential, batch_size
        self.token_weights: TokenWeights = token_weights
        self.damping = damping

    @property
    def leaves(self) -> frozenset[Part]:
        return frozenset({"grid", "codes"})


def kinds_of(layout: "Layout") -> list[str]:
    """The kinds of equivalences that the layout of a block declares."""
    declared = {equivalence.kind for equivalence in layout.equivalences}
    return [kind for kind in KINDS if kind in declared]


def check_equivalences(layout: "Layout", kinds: Sequence[str], field: str = "transform.equivalences") -> None:
    """Refuse equivalences that a block does not have.

    Args:
        layout: the layout of the block.
        kinds: the requested kinds.
        field: the setting that requests them, for the message.

    Raises:
        UserError: names the model type and the kinds that it has.
    """
    available = kinds_of(layout)
    remedy = f"choose from {', '.join(available)}" if available else "use a method without a transform"
    for kind in kinds:
        if kind not in available:
            raise UserError(f"{field}: {layout.model_type} has no equivalence {kind!r}: {remedy}")
