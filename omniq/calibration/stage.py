# SPDX-License-Identifier: Apache-2.0
"""What a stage is: given a block, its two streams and a grid, it finds a better grid, codes or transform.

A ``Stage`` is what YAML names: a small object of settings. For every block it builds a ``BlockModule``, a
LightningModule that one ``Trainer.fit`` of one Lightning epoch drives; the passes over the data are made by the loader,
because that is the only arrangement in which a run killed twice still resumes exactly (docs/resume.md).

Shapes: ``n`` samples, ``t`` tokens of a sample, ``h`` hidden size, ``o``/``i`` output and input features, ``G`` groups.
"""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:  # settings are parsed without torch
    from omniq.calibration.module import BlockModule
    from omniq.calibration.task import BlockTask
    from omniq.models.layout import Layout


class Stage(ABC):
    """Settings of a method, named in YAML by ``class_path``; one module is built of them for each block."""

    @property
    def sparse(self) -> bool:
        """Whether results have outliers, or scales that are codes, beside the codes: not every format can hold them."""
        return False

    @property
    def refines(self) -> bool:
        """Whether it builds on the codes or the grid of the stage before it, instead of starting from the weights."""
        return False

    @property
    def chooses_codes(self) -> bool:
        """Whether its codes are more than the nearest on its grid: a stage that keeps the grid alone loses them."""
        return False

    @property
    def tunes_norms(self) -> bool:
        """Whether its codes go with norms that its result holds and the block does not."""
        return False

    @property
    def moves(self) -> bool:
        """Whether it leaves a transformed block, from whose weights a later stage may start."""
        return False

    @abstractmethod
    def module(self, task: "BlockTask") -> "BlockModule":
        """The LightningModule that works on this block."""

    def check_layout(self, layout: "Layout") -> None:  # noqa: B027 (most stages accept any family)
        """Refuse a family that lacks what this stage needs.

        Raises:
            UserError: names the family and what it has.
        """

    def check(self, before: Sequence["Stage"]) -> None:  # noqa: B027 (most stages accept any place)
        """Refuse a place in the list of stages where this one cannot work.

        Args:
            before: the stages that run earlier on the same block.

        Raises:
            UserError: names both stages and the order that works.
        """
