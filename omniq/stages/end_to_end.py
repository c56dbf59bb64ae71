# SPDX-License-Identifier: Apache-2.0
r"""EndToEnd: scales, norms and biases learned over the whole model, by its distribution of the next token.

The last stage of a list. All blocks are finished; their codes ``q`` and zero points ``z`` are fixed. Scales ``s``,
norms and biases of all blocks together minimise the KL divergence from the full-precision model ``p``:

    minimise over s, n, b     mean over tokens of  KL( p(. | x) || p_Q(. | x; q, s, n, b) )

A block that is calibrated alone cannot know which directions of its output the later blocks amplify or ignore. This
loss does. There is one scale for each group of weights, so few numbers are learned, and they do not overfit as codes
do. The idea is that of the end-to-end phase of EfficientQAT (arXiv 2407.11062, section 3.3, "E2E-QP"), with a teacher
in place of the next token, and of DWQ in mlx-lm.

The loss is computed through the deployed quantizers: scales rounded to their storage dtype, and quantized activations
if the scheme has them. What is tuned is what is exported. ``omniq.calibration.tunable_block`` has the formulas of the
relative changes, ``omniq.calibration.distillation`` that of the loss.

Held-out windows (``data.held_out``) judge after every pass. The state with the least held-out KL is kept, the initial
state included, and learning stops after ``patience`` passes without a gain.

Memory. If all blocks fit on the device, a step is one batch of samples. Otherwise, a step is one pass over all samples,
with one block on the device at a time: a pass forward keeps the input of every block, and a pass back runs every block
again with gradients.

Codes can be learned, too (``codes: true``): ``q' = round(q + d)`` with a straight-through gradient. There is one
number for each weight, so this needs far more text, and a run with less than one token for 800 codes is refused.
"""

from collections.abc import Sequence
from typing import TYPE_CHECKING

from omniq.calibration.settings import Memory
from omniq.calibration.stage import ModelStage, Part, Stage
from omniq.errors import UserError

if TYPE_CHECKING:  # settings are parsed without torch
    from omniq.calibration.model_task import ModelTask
    from omniq.calibration.pass_module import PassModule

CODES_PER_TOKEN = 800
"""The most codes for one token of text. EfficientQAT learns those of a 7B model from 4096 windows of 2048 tokens."""


class EndToEnd(ModelStage):
    """Learns scales, norms and biases of all blocks together against the full-precision model.

    Args:
        epochs: passes over the calibration samples; with ``memory: block``, the number of steps.
        batch_size: samples per step and process; all samples with ``memory: block``.
        lr: learning rate of Adam for relative changes of scales. It decays to zero as a cosine.
        vectors_lr: learning rate for norms and biases, relative to their root mean square; 0 keeps them.
        codes: learn the codes, too.
        codes_lr: learning rate of codes, in units of a step of the grid.
        patience: stop after so many passes in a row without a lower held-out KL.
        memory: ``model`` keeps all blocks on the device and takes a step for each batch. ``block`` keeps one block on
            the device and takes a step for each pass. ``auto`` selects ``model`` if it fits.

    Raises:
        UserError: a number is out of range.
    """

    def __init__(
        self,
        epochs: int = 4,
        batch_size: int = 1,
        lr: float = 1e-3,
        vectors_lr: float = 1e-3,
        codes: bool = False,
        codes_lr: float = 1e-2,
        patience: int = 2,
        memory: Memory = "auto",
    ) -> None:
        for name, value in (("epochs", epochs), ("batch_size", batch_size), ("patience", patience)):
            if value < 1:
                raise UserError(f"stages: EndToEnd.{name} {value} is too small: give 1 or more")
        for name, rate in (("lr", lr), ("codes_lr", codes_lr)):
            if not 0 < rate < 1:
                raise UserError(f"stages: EndToEnd.{name} {rate} is not between 0 and 1: try 0.001")
        if not 0 <= vectors_lr < 1:
            raise UserError(f"stages: EndToEnd.vectors_lr {vectors_lr} is not at least 0 and below 1: try 0.001")
        self.epochs, self.batch_size, self.patience = epochs, batch_size, patience
        self.lr, self.vectors_lr, self.codes, self.codes_lr = lr, vectors_lr, codes, codes_lr
        self.memory: Memory = memory

    @property
    def takes(self) -> frozenset[Part]:
        return frozenset({"block", "grid", "codes", "norms", "outliers", "transforms"})

    def module(self, task: "ModelTask") -> "PassModule[ModelTask]":
        from omniq.stages.modules.end_to_end import EndToEndModule

        return EndToEndModule(task, self)

    def check_text(self, tokens: int, codes: int) -> None:
        needed = -(-codes // CODES_PER_TOKEN)
        if self.codes and tokens < needed:
            raise UserError(
                f"stages: EndToEnd.codes true: {tokens:,} tokens of text are too few to learn {codes:,} codes: give "
                f"{needed:,} or more (data.samples times data.length), or set codes to false"
            )

    def check_place_in_list(self, before: Sequence[Stage]) -> None:
        if not before:
            raise UserError(
                "stages: EndToEnd tunes finished blocks: put a stage that quantizes blocks before it, such as "
                "omniq.stages.QuantEase, or tune a finished run with `omniq tune`"
            )
