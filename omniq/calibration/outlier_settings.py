# SPDX-License-Identifier: Apache-2.0
"""Settings of the outliers that QuantEase keeps in float16; this module does not import torch."""

import logging
from dataclasses import dataclass
from typing import Any, Literal

from omniq.errors import UserError

Support = Literal["magnitude", "loss"]
Method = Literal["masked", "algorithm3"]

log = logging.getLogger("omniq")


@dataclass(frozen=True)
class OutlierSettings:
    """Weights that QuantEase keeps in float16 beside the codes.

    Args:
        fraction: fraction of the weights of each linear to keep, above 0 and up to 0.5; 0.01 keeps 1 %. At least one
            weight is kept.
        columns: keep whole columns instead of single weights; at least one column is kept.
        support: which weights to keep: the largest (``magnitude``), or those whose rounding costs most (``loss``).
        method: ``masked`` keeps the chosen weights fixed during all sweeps; ``algorithm3`` chooses them again each
            sweep.

    Raises:
        UserError: the fraction is outside this range.
    """

    fraction: float
    columns: bool = False
    support: Support = "magnitude"
    method: Method = "masked"

    def __post_init__(self) -> None:
        if not 0 < self.fraction <= 0.5:
            raise UserError(
                f"outliers.fraction {self.fraction} of QuantEase is outside 0 to 0.5: give a fraction, not per cent; "
                "0.01 keeps 1 % of the weights"
            )

    @classmethod
    def of_earlier_release(
        cls, outliers: "OutlierSettings | float | None", given: dict[str, Any]
    ) -> "OutlierSettings | None":
        """Accept the settings of the previous release: a plain number in per cent, with the other settings beside it.

        Args:
            outliers: the setting as the user gave it.
            given: the other settings in their earlier place, by their current names; None if not given.

        Raises:
            UserError: both spellings are used at once, or the number may be per cent or a fraction.
        """
        beside = {name: value for name, value in given.items() if value is not None}
        if isinstance(outliers, OutlierSettings) and beside:
            name = next(iter(beside))
            raise UserError(f"outlier_{name} of QuantEase is given beside outliers: write outliers.{name} instead")
        if outliers is None or isinstance(outliers, OutlierSettings):
            return outliers
        if 0 < outliers <= 0.5:
            raise UserError(
                f"outliers {outliers} of QuantEase is ambiguous: write outliers.fraction {outliers / 100:g} to keep "
                f"{outliers} % of the weights, or outliers.fraction {outliers} to keep {outliers:.0%}"
            )
        if not 0 <= outliers <= 50:
            raise UserError(
                f"outliers {outliers} of QuantEase is outside 0 to 50 per cent: write outliers.fraction 0.01 to keep "
                "1 % of the weights"
            )
        if not outliers:
            return None
        settings = cls(outliers / 100, **beside)
        others = "".join(f", outlier_{name} is outliers.{name}" for name in beside)
        log.warning(
            "outliers %g of QuantEase is deprecated (per cent): use outliers.fraction %g%s instead; the earlier "
            "spelling works in this release only",
            outliers, settings.fraction, others,
        )  # fmt: skip
        return settings
