# SPDX-License-Identifier: Apache-2.0
"""Settings of the outliers that QuantEase keeps in float16; needs no torch."""

import logging
from dataclasses import dataclass
from typing import Any, Literal

from omniq.errors import UserError

Support = Literal["magnitude", "loss"]
Method = Literal["masked", "algorithm3"]

log = logging.getLogger("omniq")


@dataclass(frozen=True)
class OutlierSettings:
    """Weights that are kept in float16 beside the codes (section 4 of the paper).

    Args:
        fraction: of the weights of each linear, above 0 and up to 0.5; 0.01 keeps 1 %. At least one weight is kept.
        columns: keep whole columns instead of single weights; at least one column.
        support: the largest weights (``magnitude``), or those that cost most on the grid (``loss``).
        method: the masked sweep, or Algorithm 3.

    Raises:
        UserError: a fraction that is not in this range.
    """

    fraction: float
    columns: bool = False
    support: Support = "magnitude"
    method: Method = "masked"

    def __post_init__(self) -> None:
        if not 0 < self.fraction <= 0.5:
            raise UserError(
                f"outliers.fraction {self.fraction} of QuantEase is outside 0 to 0.5: it is a fraction, not per cent; "
                "0.01 keeps 1 % of the weights"
            )

    @classmethod
    def of_earlier_release(
        cls, outliers: "OutlierSettings | float | None", given: dict[str, Any]
    ) -> "OutlierSettings | None":
        """Accept the settings of the release before this one: per cent as a plain number, the others beside it.

        Args:
            outliers: the setting as it was given.
            given: the other settings in their earlier place, by their names of today; None where they are left out.

        Raises:
            UserError: both spellings at once, or a number that may be per cent or a fraction.
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
            "outliers %g of QuantEase counts in per cent: the setting is now outliers.fraction %g%s; the earlier "
            "spelling works in this release only",
            outliers, settings.fraction, others,
        )  # fmt: skip
        return settings
