# SPDX-License-Identifier: Apache-2.0
"""A run killed between two stages ends with the bits of an uninterrupted run, for each recipe's stage list.

Whatever a later stage sees of an earlier one is read from a file after a kill.
"""

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.helpers.killing import Attempts
from tests.helpers.recipes import LONGER, recipe_sections
from tests.helpers.runs import QUICK, SMALL, outcome, write_run

LISTS = {name: part for name, part in {**recipe_sections(), **LONGER}.items() if len(part["stages"]) > 1}


@pytest.fixture(scope="module")
def attempts(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Attempts]:
    with Attempts(tmp_path_factory.mktemp("boundaries")) as made:
        yield made


@pytest.mark.parametrize("name", LISTS)
def test_run_killed_at_each_stage_boundary_resumes_to_same_bits(name: str, attempts: Attempts, tmp_path: Path) -> None:
    command = write_run(tmp_path, model=SMALL, **LISTS[name], **QUICK)
    whole = attempts.run(command, tmp_path / "whole")
    assert whole.status == 0, whole.output
    expected = outcome(tmp_path / "whole")
    of_model = sum("EndToEnd" in entry["class_path"] for entry in LISTS[name]["stages"])
    of_blocks = len(LISTS[name]["stages"]) - of_model
    ends = [f"current/{block:03d}.{number}.block" for block in range(2) for number in range(of_blocks - 1)]
    ends += ["blocks/001.safetensors", *of_model * ["model_stages.json"]] if of_model else []
    for end in ends:
        killed = attempts.run(command, tmp_path / "killed", aim=("after", end))
        assert killed.killed, killed.output
    last = attempts.run(command, tmp_path / "killed")
    assert last.status == 0, last.output
    assert outcome(tmp_path / "killed") == expected
