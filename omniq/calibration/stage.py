# SPDX-License-Identifier: Apache-2.0
"""``Stage``: the settings of a method, which finds a better grid, codes or transform for one block at a time.

YAML names a ``Stage``, a small settings object. For every block, the stage builds a ``BlockModule``, a LightningModule
that is trained by one ``Trainer.fit`` of one Lightning epoch. The loader makes the passes over the data, because only
in this arrangement a run that is killed twice still resumes exactly (docs/resume.md).

A stage declares what it ``takes`` from the previous stage and what it ``leaves`` to the next one. One rule checks a
list of stages: ``previous.leaves - stage.takes`` must be empty. The parts are

- ``block``: a transformed block. ``BlockTask.block`` carries it, so every stage takes it.
- ``grid``: scales and zero points.
- ``codes``: codes other than the nearest ones on the grid. A stage that rounds to nearest leaves only its grid.
- ``norms``: norms that are part of the result, but not of the block.
- ``outliers``: weights in float16 beside the codes.
- ``scale codes``: scales or zero points that are themselves stored as codes.
- ``transforms``: a finished block whose full-precision block, after its transforms, is not known.

A ``ModelStage`` runs once over the whole model, after all blocks are finished.

A stage that transforms the block leaves only the block. It also rounds the weights, so that it can be the last stage.

Shapes: ``n`` samples, ``t`` tokens of a sample, ``h`` hidden size, ``o``/``i`` output and input features, ``G`` groups.
"""

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar, Literal, get_args

from omniq.errors import UserError

if TYPE_CHECKING:  # settings are parsed without torch
    from omniq.calibration.model_task import ModelTask
    from omniq.calibration.pass_module import PassModule
    from omniq.grid.scheme import Activations
    from omniq.models.layout import Layout

Part = Literal["block", "grid", "codes", "norms", "outliers", "scale codes", "transforms"]
_PARTS: tuple[Part, ...] = get_args(Part)  # the order in messages


class Stage(ABC):
    """Settings of a method, named in YAML by ``class_path``; one module is built from them for each block.

    Attributes:
        settings_that_take: for error messages: the setting that makes this stage take a part.
        settings_that_omit: for error messages: the setting that makes this stage not leave a part.
    """

    settings_that_take: ClassVar[Mapping[Part, str]] = {}
    settings_that_omit: ClassVar[Mapping[Part, str]] = {}

    @property
    def takes(self) -> frozenset[Part]:
        """The parts of the previous stage's result on which this stage builds; always includes ``block``."""
        return frozenset({"block"})

    @property
    def leaves(self) -> frozenset[Part]:
        """The parts of this stage's result that the next stage must not lose."""
        return frozenset({"grid"})

    @abstractmethod
    def module(self, task: Any) -> "PassModule[Any]":
        """Build the LightningModule (a ``BlockModule``) for one block (a ``BlockTask``)."""

    def check_layout(self, layout: "Layout") -> None:  # noqa: B027 (most stages accept any family)
        """Refuse a family that lacks what this stage needs.

        Raises:
            UserError: names the family and the features that it has.
        """

    def equivalence_kinds(self, layout: "Layout", activations: "Activations") -> Sequence[str]:
        """Kinds of equivalences that this stage uses in a block; each is verified before the run starts."""
        return ()

    def check_samples(self, samples: int) -> None:  # noqa: B027 (most stages accept any number)
        """Refuse a number of samples that is too small for this stage.

        Args:
            samples: the calibration samples of one process.

        Raises:
            UserError: names the setting and the number.
        """

    def check_place_in_list(self, before: Sequence["Stage"]) -> None:  # noqa: B027 (most stages may come first)
        """Refuse a list of stages in which this stage lacks a stage that must come before it.

        Args:
            before: the stages that run earlier on the same block.

        Raises:
            UserError: names this stage and the stages that may come before it.
        """


class ModelStage(Stage):
    """Settings of a method that runs once, on all finished blocks together."""

    @abstractmethod
    def module(self, task: "ModelTask") -> "PassModule[ModelTask]":
        """Build the LightningModule for the whole model."""

    def check_text(self, tokens: int, codes: int) -> None:
        """Refuse too little calibration text.

        Args:
            tokens: number of calibration tokens of all processes.
            codes: number of quantized weights of the model.

        Raises:
            UserError: names the number of tokens that the stage needs.
        """


def check_stages(stages: Sequence[Stage]) -> None:
    """Refuse a list of stages in which a stage lacks its predecessor, or loses a part of its predecessor's result.

    Raises:
        UserError: names the stages, the part that would be lost, and the settings that avoid it.
    """
    for position, stage in enumerate(stages):
        stage.check_place_in_list(stages[:position])
        if position and isinstance(stages[position - 1], ModelStage) and not isinstance(stage, ModelStage):
            raise UserError(
                f"stages: {type(stage).__name__} quantizes blocks after {type(stages[position - 1]).__name__}, which "
                "needs finished blocks: put it before"
            )
        if position:
            _check_nothing_is_lost(stages[position - 1], stage)


def _check_nothing_is_lost(previous: Stage, stage: Stage) -> None:
    lost = [part for part in _PARTS if part in previous.leaves - stage.takes]
    if not lost:
        return
    before, name = type(previous).__name__, type(stage).__name__
    omit, take = previous.settings_that_omit, stage.settings_that_take
    remedies = {part: f"{before} with {omit[part]}" for part in lost if part in omit}
    remedies |= {part: f"{name} with {take[part]}" for part in lost if part in take and part not in omit}
    settings = dict.fromkeys(remedies[part] for part in lost if part in remedies)
    parts = " and ".join(filter(None, (", ".join(lost[:-1]), lost[-1])))
    remedy = f"use {' and '.join(settings)}, or " if len(remedies) == len(lost) else ""
    raise UserError(
        f"stages: {name} would discard the {parts} of the preceding {before}: {remedy}remove one of the two stages"
    )
