# SPDX-License-Identifier: Apache-2.0
"""Lists of stages that are accepted, and the messages for the other ones.

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


@pytest.mark.parametrize(
    ("stage", "message"),
    [
        (
            QuantEase(start="previous"),
            "QuantEase with start 'previous' needs a preceding stage: .* change start",
        ),
        (
            QuantEase(grid="previous"),
            "QuantEase with grid 'previous' needs a preceding stage: .* change grid",
        ),
        (
            LearnedRounding(),
            "LearnedRounding needs a preceding stage, whose codes it starts from: put RTN, ",
        ),
    ],
    ids=["start", "grid", "LearnedRounding"],
)
def test_check_stages_missing_predecessor_is_refused(stage: Stage, message: str) -> None:
    with pytest.raises(UserError, match=f"^stages: {message}"):
        check_stages([stage])


@pytest.mark.parametrize(
    ("stages", "message"),
    [
        ([GPTQ(), RTN()], "RTN would discard the grid and codes of the preceding GPTQ: remove one of the two stages"),
        (
            [GPTQ(), QuantEase()],
            "QuantEase would discard the codes of the preceding GPTQ: use QuantEase with start 'previous', or ",
        ),
        (
            [RTN(), QuantEase(grid="clipping")],
            "QuantEase would discard the grid of the preceding RTN: use QuantEase with start 'previous', or ",
        ),
        (
            [RTN(), LearnedRounding(norm_lr=1e-3), QuantEase(start="previous")],
            "QuantEase would discard the norms of the preceding LearnedRounding: use LearnedRounding with norm_lr 0, or ",
        ),
        (
            [QuantEase(outliers=1.0), LearnedRounding()],
            "LearnedRounding would discard the outliers of the preceding QuantEase: use QuantEase with outliers 0, or ",
        ),
        (
            [SpQR(), LearnedRounding()],
            "LearnedRounding would discard the outliers and scale codes of the preceding SpQR: use SpQR with "
            "threshold 0 and "
            "SpQR with scale_bits 0 and zero_bits 0, or remove one of the two stages",
        ),
        (
            [SpQR(threshold=0), QuantEase(grid="clipping")],
            "QuantEase would discard the grid, codes and scale codes of the preceding SpQR: use QuantEase with start "
            "'previous' and SpQR with scale_bits 0 and zero_bits 0, or ",
        ),
        (
            [SpQR(), GPTQ()],
            "GPTQ would discard the grid, codes, outliers and scale codes of the preceding SpQR: remove",
        ),
    ],
    ids=lambda value: None if isinstance(value, str) else " ".join(type(stage).__name__ for stage in value),
)
def test_check_stages_lost_part_names_stages_parts_and_settings(stages: list[Stage], message: str) -> None:
    with pytest.raises(UserError, match=f"^stages: {message}"):
        check_stages(stages)
