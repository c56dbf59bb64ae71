# SPDX-License-Identifier: Apache-2.0
"""OmniQuant (arXiv 2308.13137): learn clipping and transform of a block against the block's own output.

For a block ``F`` with weights ``W`` and inputs ``X`` (the quantized stream), equation 1 of the paper:

    minimise over clipping and transform   || F(W, X_fp) - F(Q(T(W); clipping), X) ||^2        (mean over all elements)

1. ``T`` moves scales and shifts between norms, activations and weights without changing the full-precision output of
   ``F`` (LET: ``omniq/transforms/let.py``; the equations of ``T``: ``omniq/transforms/equivalences/``). Its initial
   values are fused into the block first.
2. The clipping learns the range of each group of weights (LWC; its equation: ``omniq/quantizers/clipping.py``).
3. Each batch is one AdamW step (``omniq.calibration.reconstruction``). Where the scheme has activation bits, the
   quantized block computes on quantized inputs, queries, keys and values, in training as in the exported model.
4. After the last step, ``T`` is fused into the block and the weights are rounded.

The paper's scripts use batches of one sample, 20 epochs (40 at 2 bits), rate 1e-2, no weight decay, a constant rate,
natural order, and the augmented loss at 2 bits and for W4A4 of the first LLaMA.

Deviations from the published code: zero points stay inside the code range. The last rounding is done in float32 on
storage-rounded scales. The clipping can start from a searched range. Cosine decay of the rate and token-relative errors
are available. The transform is exact (``omniq.transforms.transform``), learned as ``exp(theta)``, with shifts for every
family.
"""

from collections.abc import Sequence
from typing import TYPE_CHECKING

from omniq.calibration.settings import Reconstruction, Schedule, TokenWeights, check_equivalences
from omniq.calibration.stage import Part
from omniq.errors import UserError
from omniq.quantizers.clipping import LWC, Clipping, RangeEstimator
from omniq.transforms.let import LET, worth_learning

if TYPE_CHECKING:  # settings are parsed without torch
    from omniq.calibration.module import BlockModule
    from omniq.calibration.task import BlockTask
    from omniq.grid.scheme import Activations
    from omniq.models.layout import Layout


class OmniQuant(Reconstruction):
    """Learned clipping and transform by block-wise reconstruction.

    Args:
        epochs: passes over the samples for each block.
        batch_size: samples per step and process (1 in the paper).
        clipping: how to choose the range of each group: learned by LWC, PACT or LSQ, or fixed by MinMax or Searched.
        clipping_lr: AdamW learning rate of the clipping (published code: 1e-2; the paper's text swaps it with LET's).
        transform: settings of LET, which learns scales and shifts; by default no transform (as published for
            weight-only LLaMA).
        augmented_loss: add the distance to the output of the full-precision block on the quantized stream (published
            for 2 bits, and for W4A4 of the first LLaMA).
        schedule: ``constant`` (published), or ``cosine`` to decay the learning rate to zero over the block.
        shuffle: draw a new order of the samples for each epoch; off as published.
        token_weights: the weight of each token in the loss and in the search of a range; ``uniform`` as published.

    Raises:
        UserError: a learning rate is outside 0 to 1, or nothing can be learned; see ``Reconstruction``.
    """

    def __init__(
        self,
        epochs: int = 20,
        batch_size: int = 1,
        clipping: LWC | Clipping | None = None,
        clipping_lr: float = 1e-2,
        transform: LET | None = None,
        augmented_loss: bool = False,
        schedule: Schedule = "constant",
        shuffle: bool = False,
        token_weights: TokenWeights = "uniform",
    ) -> None:
        super().__init__(epochs, batch_size, augmented_loss, schedule, shuffle, token_weights)
        self.clipping = clipping or LWC()
        self.clipping_lr, self.transform = clipping_lr, transform
        if not 0 < clipping_lr < 1:
            raise UserError(f"stages: OmniQuant.clipping_lr {clipping_lr} is not between 0 and 1: try the paper's 0.01")
        if isinstance(clipping, RangeEstimator) and transform is None:
            raise UserError(
                f"stages: OmniQuant has nothing to learn with clipping {type(clipping).__name__}: give a learnable "
                "clipping, such as LWC, or a transform"
            )

    @property
    def leaves(self) -> frozenset[Part]:
        return frozenset({"grid"} if self.transform is None else {"block"})

    def equivalence_kinds(self, layout: "Layout", activations: "Activations") -> Sequence[str]:
        return () if self.transform is None else worth_learning(self.transform.equivalences, activations.attention)

    def module(self, task: "BlockTask") -> "BlockModule":
        from omniq.stages.modules.omniquant import OmniQuantModule

        return OmniQuantModule(task, self)

    def check_layout(self, layout: "Layout") -> None:
        if self.transform is not None:
            check_equivalences(layout, self.transform.equivalences)
