# SPDX-License-Identifier: Apache-2.0
"""Which lists of stages are accepted, and what is said about the others.

``PAIRS`` is the table of commit 1b67ee7, which decided by five flags of a stage: what it accepted stays accepted, and
what it refused stays refused. A row is the earlier stage, a column the later one, in the order of ``STAGES``; ``.``
means accepted, ``x`` refused. A stage that needs another one before it follows RTN.
"""

from collections.abc import Callable
from itertools import product

import pytest

from omniq.calibration.stage import Stage, check_stages
from omniq.errors import UserError
from omniq.stages import AWQ, GPTQ, RTN, LearnedRounding, OmniQuant, OutlierSuppression, QuantEase, SmoothQuant, SpQR
from omniq.transforms.let import LET


def _quantease() -> dict[str, Callable[[], Stage]]:
    """QuantEase from every start, on every grid, without outliers and with them."""
    starts, grids = ("weights", "nearest", "gptq", "previous"), ("auto", "clipping", "previous")
    return {
        f"QuantEase {start} {grid} {outliers:g}": lambda a=start, b=grid, c=outliers: QuantEase(
            start=a, grid=b, outliers=c
        )
        for start, grid, outliers in product(starts, grids, (0.0, 1.0))
    }


STAGES: dict[str, Callable[[], Stage]] = {
    "RTN": RTN,
    "SmoothQuant": SmoothQuant,
    "OutlierSuppression": OutlierSuppression,
    "AWQ": AWQ,
    "OmniQuant": OmniQuant,
    "OmniQuant with LET": lambda: OmniQuant(transform=LET()),
    "GPTQ": GPTQ,
    "SpQR": SpQR,
    "SpQR without outliers": lambda: SpQR(threshold=0),
    "SpQR with plain scales": lambda: SpQR(scale_bits=0, zero_bits=0),
    "SpQR with codes alone": lambda: SpQR(threshold=0, scale_bits=0, zero_bits=0),
    "LearnedRounding": LearnedRounding,
    "LearnedRounding with norms": lambda: LearnedRounding(norm_lr=1e-3),
    **_quantease(),
}
ALONE = "...........xx....xx....xx....xxxxxxxx"
NOTHING = "x" * len(STAGES)
GRID = "xxxxxxxxxxx....xx....xx....xx........"
CODES = "xxxxxxxxxxx..xxxxxxxxxxxxxxxxxx......"
NORMS = "xxxxxxxxxxx..xxxxxxxxxxxxxxxxxxxxxxxx"
BLOCK = "." * len(STAGES)
PAIRS: dict[str, str] = {
    "RTN": GRID,
    "SmoothQuant": BLOCK,
    "OutlierSuppression": BLOCK,
    "AWQ": BLOCK,
    "OmniQuant": GRID,
    "OmniQuant with LET": BLOCK,
    "GPTQ": CODES,
    "SpQR": NOTHING,
    "SpQR without outliers": NOTHING,
    "SpQR with plain scales": NOTHING,
    "SpQR with codes alone": CODES,
    "LearnedRounding": CODES,
    "LearnedRounding with norms": NORMS,
    **{name: NOTHING if name.endswith("1") else CODES for name in _quantease()},
}


def accepted(*stages: Stage) -> bool:
    try:
        check_stages(stages)
    except UserError:
        return False
    return True


def test_check_stages_single_stage_agrees_with_1b67ee7() -> None:
    assert "".join(".x"[not accepted(make())] for make in STAGES.values()) == ALONE


@pytest.mark.parametrize("earlier", STAGES)
def test_check_stages_pair_agrees_with_1b67ee7(earlier: str) -> None:
    before = [] if ALONE[list(STAGES).index(earlier)] == "." else [RTN()]
    row = (accepted(*before, STAGES[earlier](), later()) for later in STAGES.values())
    assert "".join(".x"[not each] for each in row) == PAIRS[earlier]
